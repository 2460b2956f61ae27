//! `outrigger upgrade`: an installed mesh brought to this program's version, with the values that it was installed with.

use std::{collections::BTreeSet, ffi::OsString, process::ExitCode, time::Instant};

use anyhow::{Context, bail};
use clap::Parser;
use kubernetes::{Client, apply, look};
use serde_json::Value;

use super::{
    Common, apply_all, block_on,
    manifests::{self, Place, Step},
    place, print,
};
use crate::check;

/// Bring an installed mesh to this version, step by step: each is ready before the next one begins.
///
/// Values given to the install are kept; --set and -f change them. Pods of applications keep their proxies until they are
/// restarted: which those are is told at the end.
#[derive(Debug, Parser)]
#[command(name = "outrigger upgrade", version)]
struct Upgrade {
    #[command(flatten)]
    common: Common,
    /// Forget the values of the install: those given here and the defaults count.
    #[arg(long)]
    reset_values: bool,
    /// Also to an older version, and although `outrigger check` finds errors.
    #[arg(long)]
    force: bool,
}

/// Runs `upgrade`; `args[0]` is its own name.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    crate::finish(Upgrade::try_parse_from(args), |flags| block_on(run(&flags)))
}

async fn run(flags: &Upgrade) -> anyhow::Result<()> {
    let common = &flags.common;
    let client = common.access.client().await?;
    let former = Former::find(&client, &common.access.namespace, &common.revision).await?;
    let values = match flags.reset_values {
        true => Value::Null,
        false => former.values.clone(),
    };
    let place = place(common, values)?;
    let steps = manifests::steps(&place)?;
    if common.dry_run {
        return print(steps.iter().flat_map(|s| &s.objects));
    }
    let ours = env!("CARGO_PKG_VERSION");
    if number(&former.version) > number(ours) && !flags.force {
        bail!(
            "version {} is installed, newer than this program's {ours}: use its `outrigger upgrade`, or give --force",
            former.version
        );
    }
    let facts = check::Facts::ask(&client).await?;
    let found = check::before(&facts, &place.namespace, &place.revision);
    check::print(&found);
    if check::errors(&found) > 0 && !flags.force {
        bail!("nothing was changed; mend what is said above, or give --force");
    }
    println!("from version {} to {ours}", former.version);
    let begun = Instant::now();
    // The gateway's pods are injected by the control plane, which therefore has to be the new one by then.
    apply_all(&client, &steps, true, common.patience).await?;
    prune(&client, &place, &steps).await?;
    println!("upgraded in {:.1} s", begun.elapsed().as_secs_f64());
    let facts = check::Facts::ask(&client).await?;
    check::print(&check::after(&facts, &place.namespace, &place.revision));
    Ok(())
}

/// The values of what is installed.
pub(super) async fn values(client: &Client, common: &Common) -> anyhow::Result<Value> {
    let former = Former::find(client, &common.access.namespace, &common.revision).await?;
    Ok(former.values)
}

/// What is installed.
struct Former {
    version: String,
    values: Value,
}

impl Former {
    async fn find(client: &Client, namespace: &str, revision: &str) -> anyhow::Result<Self> {
        let deployments = look::list(client, "apps/v1", "Deployment", "deployments").await?;
        let of_place = |o: &&Value, app: &str| {
            let meta = &o["metadata"];
            meta["namespace"] == namespace
                && meta["labels"]["app"] == app
                && meta["labels"]["istio.io/rev"] == revision
        };
        let Some(found) = deployments.iter().find(|d| of_place(d, "istiod")) else {
            bail!(
                "no control plane of revision {revision} in {namespace}: use `outrigger install`"
            );
        };
        let version = found["metadata"]["labels"]["app.kubernetes.io/version"].as_str();
        let Some(version) = version else {
            bail!(
                "Deployment {} in {namespace} was not installed by this program: install beside it with --revision, and \
                 move namespaces over",
                found["metadata"]["name"].as_str().unwrap_or_default()
            );
        };
        let maps = look::list(client, "v1", "ConfigMap", "configmaps").await?;
        let text = maps
            .iter()
            .find(|m| of_place(m, "sidecar-injector"))
            .and_then(|m| m["data"]["original-values"].as_str());
        let values = match text {
            Some(text) => serde_json::from_str(text)
                .context("ConfigMap istio-sidecar-injector: original-values")?,
            None => Value::Null,
        };
        Ok(Former {
            version: version.to_owned(),
            values,
        })
    }
}

/// Removes what an older version or other values made and these do not.
async fn prune(client: &Client, place: &Place, steps: &[Step]) -> anyhow::Result<()> {
    let id = |o: &Value| {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        (
            text(&o["kind"]),
            text(&o["metadata"]["namespace"]),
            text(&o["metadata"]["name"]),
        )
    };
    let wanted: BTreeSet<_> = steps.iter().flat_map(|s| &s.objects).map(id).collect();
    let mut removed = 0;
    for (api_version, kind, plural) in KINDS {
        for mut object in look::list(client, api_version, kind, plural).await? {
            object["kind"] = (*kind).into();
            object["apiVersion"] = (*api_version).into();
            let meta = &object["metadata"];
            let labels = &meta["labels"];
            let at_home = meta["namespace"].is_null() || meta["namespace"] == *place.namespace;
            let ours = labels["app.kubernetes.io/part-of"] == "outrigger"
                && labels["istio.io/rev"] == *place.revision
                && labels["istio.io/tag"].is_null();
            if ours && at_home && !wanted.contains(&id(&object)) {
                removed += usize::from(apply::delete(client, &object).await?);
            }
        }
    }
    if removed > 0 {
        println!("{removed} objects that are not part of it any more were removed");
    }
    Ok(())
}

/// For comparison; what follows a dash does not count.
fn number(version: &str) -> Vec<u32> {
    let plain = version.split('-').next().unwrap_or_default();
    plain.split('.').map(|p| p.parse().unwrap_or(0)).collect()
}

/// The kinds that an install consists of, but definitions and the namespace.
const KINDS: &[(&str, &str, &str)] = &[
    ("apps/v1", "Deployment", "deployments"),
    ("apps/v1", "DaemonSet", "daemonsets"),
    ("v1", "Service", "services"),
    ("v1", "ServiceAccount", "serviceaccounts"),
    ("v1", "ConfigMap", "configmaps"),
    ("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    ("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    (
        "rbac.authorization.k8s.io/v1",
        "RoleBinding",
        "rolebindings",
    ),
    ("rbac.authorization.k8s.io/v1", "Role", "roles"),
    (
        "rbac.authorization.k8s.io/v1",
        "ClusterRoleBinding",
        "clusterrolebindings",
    ),
    (
        "rbac.authorization.k8s.io/v1",
        "ClusterRole",
        "clusterroles",
    ),
    (
        "admissionregistration.k8s.io/v1",
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
    ),
    (
        "admissionregistration.k8s.io/v1",
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
    ),
    (
        "admissionregistration.k8s.io/v1",
        "ValidatingAdmissionPolicyBinding",
        "validatingadmissionpolicybindings",
    ),
    (
        "admissionregistration.k8s.io/v1",
        "ValidatingAdmissionPolicy",
        "validatingadmissionpolicies",
    ),
];

#[cfg(test)]
mod tests;
