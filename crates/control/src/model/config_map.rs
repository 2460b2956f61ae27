//! Which ConfigMaps count. Many change all the time (elections and caches of others), and none of those may cost a push.

use config::{Kind, ObjectKey, Snapshot, gateway_api::ObjectReference};
use proto::istio::networking::v1alpha3::TrafficPolicy;

/// How a credential names a ConfigMap with authorities.
const SCHEME: &str = "configmap://";
const CA_SUFFIX: &str = "-cacert";
/// Settings of injection, of any revision.
const INJECTOR: &str = "istio-sidecar-injector";

/// Whether something is made of this ConfigMap: the mesh's settings, those of injection, or authorities that an object or
/// a proxy (`watched`, by the name of a secret) asks for.
pub(crate) fn is_read(
    snapshot: &Snapshot,
    key: &ObjectKey,
    watched: impl Fn(&str) -> bool,
) -> bool {
    let (namespace, name) = (key.namespace.as_str(), key.name.as_str());
    let mesh = &snapshot.mesh_map;
    if (namespace == mesh.0 && name == mesh.1) || name.starts_with(INJECTOR) {
        return true;
    }
    let bare = format!("{SCHEME}{namespace}/{name}");
    let is_it = |credential: &str| credential.strip_suffix(CA_SUFFIX).unwrap_or(credential) == bare;
    of_gateway_api(snapshot, namespace, name)
        || snapshot.destination_rules.iter().any(|rule| {
            let spec = &rule.spec;
            let subsets = spec
                .subsets
                .iter()
                .filter_map(|s| s.traffic_policy.as_ref());
            let mut all = subsets.chain(spec.traffic_policy.as_ref());
            all.any(|policy| credentials(policy).any(is_it))
        })
        || snapshot.gateways.iter().any(|gateway| {
            let mut all = gateway.spec.servers.iter().filter_map(|s| s.tls.as_ref());
            all.any(|tls| is_it(&tls.credential_name) || is_it(&tls.ca_cert_credential_name))
        })
        || watched(&bare)
        || watched(&format!("{bare}{CA_SUFFIX}"))
}

fn of_gateway_api(snapshot: &Snapshot, namespace: &str, name: &str) -> bool {
    let is_it = |own: &str, reference: &ObjectReference| {
        reference.kind == Kind::ConfigMap.name()
            && reference.name == name
            && reference.namespace.as_deref().unwrap_or(own) == namespace
    };
    snapshot.backend_tls_policies.iter().any(|policy| {
        let mut all = policy.spec.validation.ca_certificate_refs.iter();
        policy.meta.namespace == namespace
            && all.any(|r| r.kind == Kind::ConfigMap.name() && r.name == name)
    }) || snapshot.kubernetes_gateways.iter().any(|gateway| {
        let frontend = gateway.spec.tls.iter().filter_map(|t| t.frontend.as_ref());
        let mut all = frontend
            .flat_map(|f| f.per_port.iter().map(|p| &p.tls).chain([&f.default]))
            .filter_map(|c| c.validation.as_ref())
            .flat_map(|v| &v.ca_certificate_refs);
        all.any(|r| is_it(&gateway.meta.namespace, r))
    })
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

    fn read(snapshot: &Snapshot, full: &str) -> bool {
        let (namespace, name) = full.split_once('/').unwrap();
        let key = ObjectKey::new(Kind::ConfigMap, namespace, name);
        is_read(snapshot, &key, |watched| {
            watched == "configmap://shop/asked-for"
        })
    }

    #[test]
    fn only_what_somebody_refers_to_counts() {
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
            assert!(read(&snapshot, counts), "{counts}");
        }
        for not in [
            "istio-system/election-of-somebody",
            "shop/kube-root-ca.crt",
            "other/backend",
            "shop/some",
            "default/istio",
        ] {
            assert!(!read(&snapshot, not), "{not}");
        }
    }
}
