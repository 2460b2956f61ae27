//! Against an API server that plays a part: what is asked of it and written to it.

use serde_json::json;

use super::*;
use crate::play::Cluster;

fn revision(name: &str) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": format!("istio-sidecar-injector-{name}"), "labels": {"istio.io/rev": name}},
        "webhooks": [{"name": "rev.namespace.sidecar-injector.istio.io", "clientConfig": {"caBundle": "Q0E="}}],
    })
}

fn run(cluster: &Cluster, args: &[&str]) -> anyhow::Result<()> {
    let mut all = vec!["tag", "--kubeconfig", cluster.kubeconfig()];
    all.extend(args);
    let flags = Tag::try_parse_from(all)?;
    cluster.block_on(async {
        match &flags.what {
            What::Set(wanted) => set(&flags.access, wanted).await,
            What::Remove { name, yes } => remove(&flags.access, name, *yes).await,
            _ => unreachable!("not part of these tests"),
        }
    })
}

#[test]
fn a_tag_is_set_moved_and_removed() {
    let cluster = Cluster::new();
    let hooks = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";
    cluster.put(hooks, revision("1-1"));
    cluster.put(hooks, revision("1-2"));

    let missing = run(&cluster, &["set", "prod", "--revision", "1-3"]).unwrap_err();
    assert!(
        missing.to_string().contains("there are: 1-1, 1-2"),
        "{missing}"
    );

    run(&cluster, &["set", "prod", "--revision", "1-1"]).unwrap();
    let tag = cluster
        .at(&format!("{hooks}/istio-revision-tag-prod"))
        .unwrap();
    assert_eq!(tag["metadata"]["labels"]["istio.io/rev"], "1-1");
    assert_eq!(tag["metadata"]["labels"]["istio.io/tag"], "prod");
    let entry = &tag["webhooks"][0];
    assert_eq!(entry["clientConfig"]["service"]["name"], "istiod-1-1");
    assert_eq!(entry["clientConfig"]["caBundle"], "Q0E=");
    let selector = entry["namespaceSelector"]["matchExpressions"].to_string();
    assert!(selector.contains(r#""values":["prod"]"#), "{selector}");
    let role = cluster
        .at("/apis/rbac.authorization.k8s.io/v1/clusterroles/istio-revision-tag-prod-keeper")
        .unwrap();
    assert_eq!(
        role["rules"],
        json!([{
            "apiGroups": ["admissionregistration.k8s.io"], "resources": ["mutatingwebhookconfigurations"],
            "resourceNames": ["istio-revision-tag-prod"], "verbs": ["patch"],
        }])
    );

    let there = run(&cluster, &["set", "prod", "--revision", "1-2"]).unwrap_err();
    assert!(there.to_string().contains("--overwrite"), "{there}");
    run(
        &cluster,
        &["set", "prod", "--revision", "1-2", "--overwrite"],
    )
    .unwrap();
    let tag = cluster
        .at(&format!("{hooks}/istio-revision-tag-prod"))
        .unwrap();
    assert_eq!(
        tag["webhooks"][0]["clientConfig"]["service"]["name"],
        "istiod-1-2"
    );

    cluster.put(
        "/api/v1/namespaces",
        json!({"metadata": {"name": "shop", "labels": {"istio.io/rev": "prod"}}}),
    );
    let used = run(&cluster, &["remove", "prod"]).unwrap_err();
    assert!(used.to_string().contains("shop"), "{used}");
    run(&cluster, &["remove", "prod", "-y"]).unwrap();
    assert!(
        cluster
            .at(&format!("{hooks}/istio-revision-tag-prod"))
            .is_none()
    );
    assert!(run(&cluster, &["remove", "prod"]).is_err());
}

#[test]
fn a_tag_cannot_have_a_revision_s_name() {
    let cluster = Cluster::new();
    let hooks = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";
    cluster.put(hooks, revision("default"));
    cluster.put(hooks, revision("1-2"));
    let same = run(&cluster, &["set", "default", "--revision", "1-2"]).unwrap_err();
    assert!(same.to_string().contains("answers for its pods"), "{same}");
    let bad = run(&cluster, &["set", "Prod", "--revision", "1-2"]).unwrap_err();
    assert!(bad.to_string().contains("lower-case"), "{bad}");
}
