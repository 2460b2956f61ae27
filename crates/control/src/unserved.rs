//! Objects that are read and not acted upon: each is a problem that the log, `/debug/problems` and `proxy-status` show,
//! because a policy that nobody enforces must not look as if it were.

use config::{Kind, Object, ObjectKey, Problem, Severity, Snapshot};

/// One problem for each object of a kind that translation does not know.
pub(crate) fn problems(snapshot: &Snapshot) -> Vec<Problem> {
    let mut out = Vec::new();
    let s = snapshot;
    // What protects a workload is an error to leave out; what adds to it, a warning.
    all(
        &mut out,
        Kind::AuthorizationPolicy,
        s.authorization_policies.iter(),
        Severity::Error,
    );
    all(
        &mut out,
        Kind::RequestAuthentication,
        s.request_authentications.iter(),
        Severity::Error,
    );
    all(
        &mut out,
        Kind::WasmPlugin,
        s.wasm_plugins.iter(),
        Severity::Warning,
    );
    all(
        &mut out,
        Kind::TrafficExtension,
        s.traffic_extensions.iter(),
        Severity::Warning,
    );
    all(
        &mut out,
        Kind::KubernetesGateway,
        s.kubernetes_gateways.iter(),
        Severity::Warning,
    );
    all(
        &mut out,
        Kind::HttpRoute,
        s.http_routes.iter(),
        Severity::Warning,
    );
    all(
        &mut out,
        Kind::GrpcRoute,
        s.grpc_routes.iter(),
        Severity::Warning,
    );
    all(
        &mut out,
        Kind::TlsRoute,
        s.tls_routes.iter(),
        Severity::Warning,
    );
    all(
        &mut out,
        Kind::TcpRoute,
        s.tcp_routes.iter(),
        Severity::Warning,
    );
    out
}

fn all<'a, T: 'a>(
    out: &mut Vec<Problem>,
    kind: Kind,
    objects: impl Iterator<Item = &'a std::sync::Arc<Object<T>>>,
    severity: Severity,
) {
    let what = match severity {
        Severity::Error => "is NOT enforced: traffic flows as if it were not there",
        Severity::Warning => "has no effect",
    };
    out.extend(objects.map(|o| Problem {
        severity,
        file: o.source.file.clone(),
        line: o.source.line,
        object: Some(ObjectKey::new(kind, &*o.meta.namespace, &*o.meta.name)),
        field: String::new(),
        message: format!("{kind} {what}; this version does not translate it yet, so remove it or run istiod for it"),
    }));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_policy_that_is_not_enforced_is_an_error_with_its_place() {
        let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n\
            apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
            metadata: {name: deny, namespace: a}\nspec: {}\n";
        let (snapshot, _) = Snapshot::from_texts([(Path::new("p.yaml"), text)]);
        let found = problems(&snapshot);
        assert_eq!(found.len(), 1);
        let shown = found[0].to_string();
        assert!(found[0].severity == Severity::Error, "{shown}");
        assert!(
            shown.starts_with("p.yaml:5: AuthorizationPolicy a/deny:"),
            "{shown}"
        );
        assert!(shown.contains("NOT enforced"), "{shown}");
    }
}
