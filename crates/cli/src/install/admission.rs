//! What roles cannot say about the control plane's rights: `create` is bound to no names, and what runs a Gateway has the
//! name that its owner chose. The API server refuses by these policies what is not part of a Gateway.

use serde_json::{Value, json};

use super::manifests::Place;

/// Since Kubernetes 1.30; an older API server does not know the kinds.
pub(super) const KINDS: [&str; 2] = [
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
];

/// Both policies with their bindings.
pub(super) fn all(place: &Place) -> Vec<Value> {
    let owned = |object: &str| {
        format!(
            "has({object}.metadata.ownerReferences) && {object}.metadata.ownerReferences.exists(o, \
             o.kind == 'Gateway' && o.apiVersion.startsWith('gateway.networking.k8s.io/'))"
        )
    };
    let own = policy(
        place,
        "istiod-gateways",
        json!([
            {"apiGroups": ["apps"], "apiVersions": ["*"], "operations": ["CREATE", "UPDATE"], "resources": ["deployments"]},
            {"apiGroups": [""], "apiVersions": ["*"], "operations": ["CREATE", "UPDATE"], "resources": ["services", "serviceaccounts"]},
        ]),
        json!([
            {"expression": owned("object"), "message": "the control plane may write only what belongs to a Gateway"},
            // A ServiceAccount may have been there before a Gateway named it.
            {"expression": format!("request.resource.resource == 'serviceaccounts' || oldObject == null || ({})", owned("oldObject")),
             "message": "the control plane may change only what belongs to a Gateway"},
        ]),
    );
    let spec = "object.spec.template.spec";
    let never = |field: &str| format!("(!has({spec}.{field}) || !{spec}.{field})");
    let unprivileged = |containers: &str| {
        format!(
            "(!has({spec}.{containers}) || {spec}.{containers}.all(c, !has(c.securityContext) || \
             !has(c.securityContext.privileged) || !c.securityContext.privileged))"
        )
    };
    let parts = [
        never("hostNetwork"),
        never("hostPID"),
        never("hostIPC"),
        unprivileged("containers"),
        unprivileged("initContainers"),
        format!("(!has({spec}.volumes) || {spec}.volumes.all(v, !has(v.hostPath)))"),
    ];
    let pods = policy(
        place,
        "istiod-gateway-pods",
        json!([
            {"apiGroups": ["apps"], "apiVersions": ["*"], "operations": ["CREATE", "UPDATE"], "resources": ["deployments"]},
        ]),
        json!([{
            "expression": parts.join(" && "),
            "message": "the control plane may run no pods with rights on their node",
        }]),
    );
    [own, pods].concat()
}

/// A policy for the control plane's account, and that it is in force.
fn policy(place: &Place, name: &str, rules: Value, validations: Value) -> Vec<Value> {
    let name = place.cluster_wide(name);
    let labels = place.labels("istiod");
    let account = format!(
        "system:serviceaccount:{}:{}",
        place.namespace,
        place.named("istiod")
    );
    vec![
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": KINDS[0],
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "failurePolicy": "Fail",
                "matchConditions": [{
                    "name": "of-the-control-plane",
                    "expression": format!("request.userInfo.username == '{account}'"),
                }],
                "matchConstraints": {"resourceRules": rules},
                "validations": validations,
            },
        }),
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": KINDS[1],
            "metadata": {"name": name, "labels": labels},
            "spec": {"policyName": name, "validationActions": ["Deny"]},
        }),
    ]
}
