//! Against an API server that plays a part.

use super::*;
use crate::{install, play::Cluster};

fn upgrade(cluster: &Cluster, more: &[&str]) -> anyhow::Result<()> {
    let mut args = vec!["upgrade", "--kubeconfig", cluster.kubeconfig()];
    args.extend(more);
    let flags = Upgrade::try_parse_from(args)?;
    cluster.block_on(run(&flags))
}

fn installed(cluster: &Cluster, more: &[&str]) {
    let mut args = vec!["install", "--kubeconfig", cluster.kubeconfig()];
    args.extend(more);
    let flags = install::Install::try_parse_from(args).unwrap();
    let steps = install::steps(&flags.common).unwrap();
    cluster.block_on(install::put(&flags, steps)).unwrap();
}

const ISTIOD: &str = "/apis/apps/v1/namespaces/istio-system/deployments/istiod";
const GATEWAY: &str = "/apis/apps/v1/namespaces/istio-system/deployments/istio-ingressgateway";

#[test]
fn values_of_the_install_are_kept_and_what_is_gone_is_removed() {
    let cluster = Cluster::new();
    let none = upgrade(&cluster, &[]).unwrap_err().to_string();
    assert!(none.contains("use `outrigger install`"), "{none}");

    installed(&cluster, &["--set", "pilot.replicaCount=3"]);
    let before = cluster.len();
    let mut old = cluster.at(ISTIOD).unwrap();
    old["metadata"]["labels"]["app.kubernetes.io/version"] = "0.0.1".into();
    cluster.put("/apis/apps/v1/namespaces/istio-system/deployments", old);

    upgrade(&cluster, &["--set", "global.tag=new"]).unwrap();
    let now = cluster.at(ISTIOD).unwrap();
    assert_eq!(now["spec"]["replicas"], 3);
    let labels = &now["metadata"]["labels"];
    assert_eq!(
        labels["app.kubernetes.io/version"],
        env!("CARGO_PKG_VERSION")
    );
    let gateway = cluster.at(GATEWAY).unwrap();
    let image =
        &gateway["spec"]["template"]["metadata"]["annotations"]["sidecar.istio.io/proxyImage"];
    assert_eq!(image, "outrigger.local/outrigger-proxy:new");
    assert_eq!(cluster.len(), before);

    let gateways = "gateways.istio-ingressgateway.enabled=false";
    upgrade(&cluster, &["--set", gateways]).unwrap();
    assert!(cluster.at(GATEWAY).is_none());
    assert_eq!(cluster.at(ISTIOD).unwrap()["spec"]["replicas"], 3);
    upgrade(&cluster, &["--reset-values"]).unwrap();
    assert_eq!(cluster.at(ISTIOD).unwrap()["spec"]["replicas"], 1);
    assert!(cluster.at(GATEWAY).is_some());
}

#[test]
fn a_newer_version_is_not_overwritten_unasked() {
    let cluster = Cluster::new();
    installed(&cluster, &[]);
    let mut newer = cluster.at(ISTIOD).unwrap();
    newer["metadata"]["labels"]["app.kubernetes.io/version"] = "99.0.0".into();
    cluster.put("/apis/apps/v1/namespaces/istio-system/deployments", newer);
    let refused = upgrade(&cluster, &[]).unwrap_err().to_string();
    assert!(refused.contains("99.0.0"), "{refused}");
    upgrade(&cluster, &["--force"]).unwrap();
}
