//! Which ConfigMaps and Secrets count. Many change all the time (elections, caches and tokens of others), and none of
//! those may cost a push.

use config::{
    Kind, ObjectKey, Snapshot,
    gateway_api::{Listener, ObjectReference},
};
use proto::istio::networking::v1alpha3::{ServerTlsSettings, TrafficPolicy};

/// How a credential names a ConfigMap with authorities.
const CONFIG_MAP: &str = "configmap://";
/// How a credential names a Secret of the proxy's own namespace …
const SECRET: &str = "kubernetes://";
/// … and one of any.
const SECRET_ANYWHERE: &str = "kubernetes-gateway://";
/// What stands behind the name of a certificate for the authorities that belong to it, which may be an object of their own.
const CA_SUFFIX: &str = "-cacert";
/// Settings of injection, of any revision.
const INJECTOR: &str = "istio-sidecar-injector";

/// Whether something is made of this ConfigMap or Secret: the mesh's settings, those of injection, or a certificate or
/// authorities that an object or a proxy (`watched`, by the name of a secret) asks for.
pub(crate) fn is_read(
    snapshot: &Snapshot,
    key: &ObjectKey,
    watched: impl Fn(&str) -> bool,
) -> bool {
    let (namespace, name) = (key.namespace.as_str(), key.name.as_str());
    let mesh = &snapshot.mesh_map;
    if key.kind == Kind::ConfigMap
        && ((namespace == mesh.0 && name == mesh.1) || name.starts_with(INJECTOR))
    {
        return true;
    }
    let names = |own: &str, credential: &str| names(key, own, credential);
    of_gateway_api(snapshot, key)
        || snapshot.destination_rules.iter().any(|rule| {
            let spec = &rule.spec;
            let subsets = spec
                .subsets
                .iter()
                .filter_map(|s| s.traffic_policy.as_ref());
            let mut all = subsets
                .chain(spec.traffic_policy.as_ref())
                .flat_map(credentials);
            all.any(|credential| names(&rule.meta.namespace, credential))
        })
        || snapshot.gateways.iter().any(|gateway| {
            let all = gateway.spec.servers.iter().filter_map(|s| s.tls.as_ref());
            all.flat_map(served)
                .any(|credential| names(&gateway.meta.namespace, credential))
        })
        || asked_for(key).iter().any(|resource| watched(resource))
}

/// Whether a credential that is written in the namespace `own` names the object.
fn names(key: &ObjectKey, own: &str, credential: &str) -> bool {
    let is_it = |namespace: &str, name: &str| {
        namespace == key.namespace && without_suffix(name) == without_suffix(&key.name)
    };
    let full = |text: &str| {
        text.split_once('/')
            .is_some_and(|(ns, name)| is_it(ns, name))
    };
    match (key.kind, credential) {
        (_, "") => false,
        (Kind::ConfigMap, credential) => credential.strip_prefix(CONFIG_MAP).is_some_and(full),
        (_, credential) => match credential.strip_prefix(SECRET_ANYWHERE) {
            Some(text) => full(text),
            None => is_it(own, credential.strip_prefix(SECRET).unwrap_or(credential)),
        },
    }
}

/// The names under which a proxy can ask for the object.
fn asked_for(key: &ObjectKey) -> Vec<String> {
    let (namespace, name) = (&key.namespace, without_suffix(&key.name));
    let stems = match key.kind {
        Kind::ConfigMap => vec![format!("{CONFIG_MAP}{namespace}/{name}")],
        _ => vec![
            format!("{SECRET}{name}"),
            format!("{SECRET_ANYWHERE}{namespace}/{name}"),
        ],
    };
    let with_suffix: Vec<String> = stems.iter().map(|s| format!("{s}{CA_SUFFIX}")).collect();
    [stems, with_suffix].concat()
}

fn without_suffix(name: &str) -> &str {
    name.strip_suffix(CA_SUFFIX).unwrap_or(name)
}

fn of_gateway_api(snapshot: &Snapshot, key: &ObjectKey) -> bool {
    let is_kind = |kind: &str| match key.kind {
        Kind::ConfigMap => kind == Kind::ConfigMap.name(),
        // What a listener names without a kind is a Secret.
        _ => kind.is_empty() || kind == key.kind.name(),
    };
    let is_it = |own: &str, reference: &ObjectReference| {
        is_kind(&reference.kind)
            && reference.name == key.name
            && reference.namespace.as_deref().unwrap_or(own) == key.namespace
    };
    let of_listeners = |own: &str, listeners: &[Listener]| {
        let all = listeners.iter().filter_map(|l| l.tls.as_ref());
        all.flat_map(|tls| &tls.certificate_refs)
            .any(|reference| is_it(own, reference))
    };
    let policies = &snapshot.backend_tls_policies;
    policies.iter().any(|policy| {
        let mut all = policy.spec.validation.ca_certificate_refs.iter();
        policy.meta.namespace == key.namespace
            && all.any(|r| is_kind(&r.kind) && r.name == key.name)
    }) || snapshot.kubernetes_gateways.iter().any(|gateway| {
        let own = &gateway.meta.namespace;
        let frontend = gateway.spec.tls.iter().filter_map(|t| t.frontend.as_ref());
        let mut all = frontend
            .flat_map(|f| f.per_port.iter().map(|p| &p.tls).chain([&f.default]))
            .filter_map(|c| c.validation.as_ref())
            .flat_map(|v| &v.ca_certificate_refs);
        all.any(|r| is_it(own, r)) || of_listeners(own, &gateway.spec.listeners)
    }) || snapshot
        .listener_sets
        .iter()
        .any(|set| of_listeners(&set.meta.namespace, &set.spec.listeners))
}

fn served(tls: &ServerTlsSettings) -> impl Iterator<Item = &str> {
    let several = tls.credential_names.iter();
    several
        .chain([&tls.credential_name, &tls.ca_cert_credential_name])
        .map(String::as_str)
}

fn credentials(policy: &TrafficPolicy) -> impl Iterator<Item = &str> {
    let ports = policy.port_level_settings.iter();
    let ports = ports.filter_map(|p| p.tls.as_ref());
    ports
        .chain(policy.tls.as_ref())
        .map(|tls| tls.credential_name.as_str())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(snapshot: &Snapshot, kind: Kind, full: &str) -> bool {
        let (namespace, name) = full.split_once('/').unwrap();
        let key = ObjectKey::new(kind, namespace, name);
        is_read(snapshot, &key, |watched| {
            matches!(
                watched,
                "configmap://shop/asked-for" | "kubernetes://asked-for-cacert"
            )
        })
    }

    #[test]
    fn only_config_maps_that_somebody_refers_to_count() {
        let text = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: p, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: b}]
  validation: {hostname: b.test, caCertificateRefs: [{group: "", kind: ConfigMap, name: backend}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: g, namespace: shop}
spec:
  gatewayClassName: istio
  listeners: [{name: a, port: 80, protocol: HTTP}]
  tls:
    frontend:
      default: {validation: {caCertificateRefs: [{group: "", kind: ConfigMap, name: clients}]}}
      perPort: [{port: 443, tls: {validation: {caCertificateRefs: [{group: "", kind: ConfigMap, name: some, namespace: other}]}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: d, namespace: shop}
spec: {host: b, trafficPolicy: {tls: {mode: SIMPLE, credentialName: "configmap://shop/rule"}}}
"#;
        let (snapshot, problems) = Snapshot::from_texts([(Path::new("m.yaml"), text)]);
        assert!(problems.is_empty(), "{problems:?}");
        for counts in [
            "istio-system/istio",
            "istio-system/istio-sidecar-injector-canary",
            "shop/backend",
            "shop/clients",
            "other/some",
            "shop/rule",
            "shop/asked-for",
        ] {
            assert!(read(&snapshot, Kind::ConfigMap, counts), "{counts}");
        }
        for not in [
            "istio-system/election-of-somebody",
            "shop/kube-root-ca.crt",
            "other/backend",
            "shop/some",
            "default/istio",
        ] {
            assert!(!read(&snapshot, Kind::ConfigMap, not), "{not}");
        }
    }

    #[test]
    fn only_secrets_that_somebody_refers_to_count() {
        let text = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: g, namespace: shop}
spec:
  gatewayClassName: istio
  listeners:
  - {name: a, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: listener}, {name: far, namespace: certs}]}}
  tls: {frontend: {default: {validation: {caCertificateRefs: [{group: "", kind: Secret, name: clients}]}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: ListenerSet
metadata: {name: s, namespace: team}
spec:
  parentRef: {name: g, namespace: shop}
  listeners: [{name: b, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: of-set}]}}]
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: i, namespace: edge}
spec:
  selector: {istio: ingressgateway}
  servers:
  - {port: {number: 443, name: a, protocol: HTTPS}, hosts: [a.test], tls: {mode: MUTUAL, credentialName: plain}}
  - {port: {number: 443, name: b, protocol: HTTPS}, hosts: [b.test], tls: {mode: SIMPLE, credentialName: "kubernetes-gateway://certs/full"}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: d, namespace: edge}
spec: {host: b, trafficPolicy: {tls: {mode: MUTUAL, credentialName: "kubernetes://client"}}}
"#;
        let (snapshot, _) = Snapshot::from_texts([(Path::new("m.yaml"), text)]);
        for counts in [
            "shop/listener",
            "certs/far",
            "shop/clients",
            "team/of-set",
            "edge/plain",
            "edge/plain-cacert",
            "certs/full",
            "edge/client",
            "edge/client-cacert",
            "anywhere/asked-for",
        ] {
            assert!(read(&snapshot, Kind::Secret, counts), "{counts}");
        }
        for not in [
            "shop/passwords",
            "shop/plain",
            "edge/full",
            "certs/listener",
            "istio-system/istio-sidecar-injector",
        ] {
            assert!(!read(&snapshot, Kind::Secret, not), "{not}");
        }
    }
}
