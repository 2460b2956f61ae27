//! Secrets over ADS: certificates that a gateway's servers, or rules of the workload's own namespace, name.
//!
//! Who asks has proven its service account, and gets what is written for that account alone: a secret of its own
//! namespace that a Gateway names whose selector takes one of the account's pods, or a DestinationRule for such a pod.
//! What a proxy says of itself does not count: its labels are those of its pods. Everything else is left out, which
//! tells the proxy that there is none.

use std::collections::BTreeSet;

use base::spiffe::Identity;
use config::{Kind, labels_match};
use proto::{
    envoy::{
        config::core::v3::{DataSource, data_source::Specifier},
        extensions::transport_sockets::tls::v3::{
            CertificateValidationContext, Secret, TlsCertificate, secret,
        },
    },
    istio::networking::v1alpha3::{ClientTlsSettings, TrafficPolicy},
};
use tls::{identity::Identity as Pair, trust::Trust};

use crate::model::{BoundGateway, Labels, Mesh, Origin, Resource, gateway::Binding};

const PREFIX: &str = "kubernetes://";
const GATEWAY_PREFIX: &str = "kubernetes-gateway://";
/// Authorities in a ConfigMap: no secret, given to everybody.
const CONFIG_MAP_PREFIX: &str = "configmap://";
/// The roots that belong to a certificate.
const CA_SUFFIX: &str = "-cacert";

/// The secrets of these names that the caller may have.
pub fn build(mesh: &Mesh, caller: &Identity, names: &[&str]) -> Vec<Resource> {
    let allowed = allowed(mesh, caller);
    let found = names
        .iter()
        .filter_map(|name| match one(mesh, caller, &allowed, name) {
            Ok(resource) => Some(resource),
            Err(why) => {
                tracing::warn!("secret {name} for {caller}: {why}");
                None
            }
        });
    found.collect()
}

fn one(
    mesh: &Mesh,
    caller: &Identity,
    allowed: &BTreeSet<(String, String)>,
    name: &str,
) -> Result<Resource, String> {
    let own = caller.namespace();
    if let Some(full) = name.strip_prefix(CONFIG_MAP_PREFIX) {
        return authorities(mesh, name, full);
    }
    let (own, wanted) = if let Some(name) = name.strip_prefix(PREFIX) {
        (own, name)
    } else if let Some(full) = name.strip_prefix(GATEWAY_PREFIX) {
        full.split_once('/').ok_or("it has no namespace")?
    } else {
        return Err("neither kubernetes:// nor kubernetes-gateway://".to_owned());
    };
    let base = wanted.strip_suffix(CA_SUFFIX);
    let has = |name: &str| allowed.contains(&(own.to_owned(), name.to_owned()));
    if !has(wanted) && !base.is_some_and(has) {
        return Err("no Gateway and no DestinationRule for its pods names it".to_owned());
    }
    let get = |name: &str| mesh.snapshot().secrets.get(own, name);
    let missing = || format!("there is no Secret {own}/{wanted}");
    let (object, secret) = match base {
        None => {
            let object = get(wanted).ok_or_else(missing)?;
            (object, certificate(name, &object.spec)?)
        }
        // A secret of its own, else the authority that stands beside the certificate.
        Some(base) => {
            let object = get(wanted).or_else(|| get(base)).ok_or_else(missing)?;
            (object, roots(name, &object.spec)?)
        }
    };
    let origin = Origin::of(Kind::Secret, object.as_ref());
    Ok(Resource::new(name, &secret, vec![origin]))
}

/// The secrets, as (namespace, name), that may be given to the caller.
fn allowed(mesh: &Mesh, caller: &Identity) -> BTreeSet<(String, String)> {
    let identity = caller.to_string();
    let namespace = caller.namespace();
    let pods = mesh.workloads().pods_in(namespace);
    let labels: Vec<&Labels> = pods
        .filter(|w| w.identity == identity)
        .map(|w| &w.labels)
        .collect();
    let mut out = BTreeSet::new();
    let mut gateway = false;
    for bound in mesh.gateways() {
        if is_of(mesh, bound, caller, &labels) {
            gateway = true;
            let servers = bound.object.spec.servers.iter();
            let servers = servers.filter_map(|s| s.tls.as_ref());
            for tls in servers {
                out.extend(tls.credential_names.iter().cloned());
                out.extend([
                    tls.credential_name.clone(),
                    tls.ca_cert_credential_name.clone(),
                ]);
            }
        }
    }
    for rule in mesh.snapshot().destination_rules.iter() {
        if rule.meta.namespace != namespace {
            continue;
        }
        let applies = match &rule.spec.workload_selector {
            Some(selector) => labels.iter().any(|own| {
                let wanted = &selector.match_labels;
                wanted.iter().all(|(k, v)| own.get(k) == Some(v))
            }),
            None => gateway,
        };
        if applies {
            let policies = rule.spec.subsets.iter().map(|s| s.traffic_policy.as_ref());
            for policy in policies
                .chain([rule.spec.traffic_policy.as_ref()])
                .flatten()
            {
                out.extend(credentials_of(policy));
            }
        }
    }
    out.remove("");
    out.into_iter()
        .map(|name| named(&name, namespace))
        .collect()
}

/// Whether a Gateway is one of the caller's pods': by its selector, or because they serve its service.
fn is_of(mesh: &Mesh, bound: &BoundGateway, caller: &Identity, pods: &[&Labels]) -> bool {
    let Binding::Service(service) = &bound.binding else {
        return pods.iter().any(|labels| bound.selects(labels));
    };
    if service.namespace != caller.namespace() {
        return false;
    }
    match &service.service_account {
        Some(account) => account == caller.service_account(),
        None => service.hosts.iter().any(|host| {
            let found = mesh.services().get(host, &service.namespace);
            found.is_some_and(|s| {
                let selects = |labels: &&Labels| labels_match(&s.selector, labels);
                !s.selector.is_empty() && pods.iter().any(selects)
            })
        }),
    }
}

fn credentials_of(policy: &TrafficPolicy) -> Vec<String> {
    let of = |tls: &ClientTlsSettings| tls.credential_name.clone();
    let ports = policy.port_level_settings.iter();
    let ports = ports.filter_map(|p| p.tls.as_ref()).map(of);
    ports.chain(policy.tls.as_ref().map(of)).collect()
}

/// Namespace and name: a rule may write `kubernetes://NAME` as well, and what Gateway API's listeners name is written
/// with its namespace (whether that may be another one has been decided).
fn named(name: &str, namespace: &str) -> (String, String) {
    let full = name.strip_prefix(GATEWAY_PREFIX);
    if let Some((namespace, name)) = full.and_then(|f| f.split_once('/')) {
        return (namespace.to_owned(), name.to_owned());
    }
    let bare = name.strip_prefix(PREFIX).unwrap_or(name);
    (namespace.to_owned(), bare.to_owned())
}

/// The authorities of `NAMESPACE/NAME-cacert`, of a ConfigMap.
fn authorities(mesh: &Mesh, name: &str, full: &str) -> Result<Resource, String> {
    let (namespace, map) = full.split_once('/').ok_or("it has no namespace")?;
    let map = map.strip_suffix(CA_SUFFIX).unwrap_or(map);
    let object = mesh.snapshot().config_maps.get(namespace, map);
    let object = object.ok_or_else(|| format!("there is no ConfigMap {namespace}/{map}"))?;
    let bundle = roots_of_map(&object.spec)?;
    let secret = Secret {
        name: name.to_owned(),
        r#type: Some(secret::Type::ValidationContext(
            CertificateValidationContext {
                trusted_ca: Some(inline(bundle.as_bytes())),
                ..CertificateValidationContext::default()
            },
        )),
    };
    let origin = Origin::of(Kind::ConfigMap, object.as_ref());
    Ok(Resource::new(name, &secret, vec![origin]))
}

fn roots_of_map(map: &config::kubernetes::ConfigMap) -> Result<&str, String> {
    let found = ["cacert", "ca.crt"]
        .iter()
        .find_map(|key| map.data.get(*key));
    let bundle = found.ok_or("it has neither cacert nor ca.crt")?;
    Trust::from_pem(bundle.as_bytes()).map_err(|e| e.to_string())?;
    Ok(bundle)
}

/// What is wrong with the authorities in a ConfigMap.
pub(crate) fn check_config_map(map: &config::kubernetes::ConfigMap) -> Result<(), String> {
    roots_of_map(map).map(drop)
}

/// What is wrong with the certificate in a Secret.
pub(crate) fn check_certificate(secret: &config::kubernetes::Secret) -> Result<(), String> {
    certificate("", secret).map(drop)
}

/// What is wrong with the authorities in a Secret.
pub(crate) fn check_roots(secret: &config::kubernetes::Secret) -> Result<(), String> {
    roots("", secret).map(drop)
}

fn certificate(name: &str, secret: &config::kubernetes::Secret) -> Result<Secret, String> {
    let pair = [("tls.crt", "tls.key"), ("cert", "key")];
    let found = pair
        .iter()
        .find_map(|(chain, key)| Some((secret.get(chain)?, secret.get(key)?)));
    let (chain, key) = found.ok_or("it has neither tls.crt and tls.key nor cert and key")?;
    // Looked at here, where the operator is told, rather than in each proxy.
    Pair::from_pem(chain, key).map_err(|e| e.to_string())?;
    Ok(Secret {
        name: name.to_owned(),
        r#type: Some(secret::Type::TlsCertificate(TlsCertificate {
            certificate_chain: Some(inline(chain)),
            private_key: Some(inline(key)),
            ..TlsCertificate::default()
        })),
    })
}

fn roots(name: &str, secret: &config::kubernetes::Secret) -> Result<Secret, String> {
    let found = ["cacert", "ca.crt"].iter().find_map(|key| secret.get(key));
    let bundle = found.ok_or("it has neither cacert nor ca.crt")?;
    Trust::from_pem(bundle).map_err(|e| e.to_string())?;
    let lists = ["crl", "ca.crl"].iter().find_map(|key| secret.get(key));
    Ok(Secret {
        name: name.to_owned(),
        r#type: Some(secret::Type::ValidationContext(
            CertificateValidationContext {
                trusted_ca: Some(inline(bundle)),
                crl: lists.map(inline),
                ..CertificateValidationContext::default()
            },
        )),
    })
}

fn inline(bytes: &[u8]) -> DataSource {
    DataSource {
        specifier: Some(Specifier::InlineBytes(bytes.to_vec())),
        ..DataSource::default()
    }
}
