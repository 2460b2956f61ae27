//! `outrigger install` and `uninstall`: the manifests, in the order in which a cluster needs them.

mod admission;
mod cni;
mod control_plane;
mod gateway;
mod manifests;
mod rights;
pub(crate) mod tag;
mod upgrade;
mod values;
mod webhooks;

use std::{
    ffi::OsString,
    io::Write,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::{Args, Parser};
use kubernetes::{
    Client,
    apply::{self, Outcome},
    lease, look,
};
use serde_json::{Value, json};

use self::{
    manifests::{Place, Step},
    values::Values,
};

pub(crate) use self::upgrade::main as upgrade;

/// Which mesh of which cluster.
#[derive(Debug, Args)]
pub(crate) struct Access {
    /// Kubeconfig of the cluster; $KUBECONFIG or ~/.kube/config if not given.
    #[arg(short = 'c', long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Namespace of the control plane.
    #[arg(
        short = 'i',
        long = "istioNamespace",
        default_value = "istio-system",
        value_name = "NAME"
    )]
    pub(crate) namespace: String,
}

/// What the commands that know manifests need.
#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    access: Access,
    /// Revision: several may be installed side by side.
    #[arg(short, long, default_value = "default", value_name = "NAME")]
    revision: String,
    /// Values by path, as in global.hub=registry.example/mesh or pilot.replicaCount=2.
    #[arg(short, long = "set", value_name = "PATH=VALUE")]
    set: Vec<String>,
    /// Files with values (YAML), in Istio's form; later ones win, --set wins over all.
    #[arg(short = 'f', long = "filename", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Print the manifests and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Nothing is asked, with or without this.
    #[arg(short = 'y', long = "skip-confirmation")]
    yes: bool,
    /// Patience with each step.
    #[arg(long = "readiness-timeout", alias = "timeout", default_value = "5m0s", value_name = "DURATION", value_parser = duration)]
    patience: Duration,
}

/// Install the mesh in a Kubernetes cluster. Doing it again with other values changes what is there.
#[derive(Debug, Parser)]
#[command(name = "outrigger install", version)]
struct Install {
    #[command(flatten)]
    common: Common,
    /// Come back when everything is ready.
    #[arg(long)]
    wait: bool,
    /// Print the values that count where none are given, and change nothing.
    #[arg(long)]
    print_defaults: bool,
}

/// Take the mesh out of a cluster. Definitions and the objects of users stay, unless --purge is given.
#[derive(Debug, Parser)]
#[command(name = "outrigger uninstall", version)]
struct Uninstall {
    #[command(flatten)]
    common: Common,
    /// Also remove the definitions with all objects of them, and the namespace.
    #[arg(long)]
    purge: bool,
}

/// Runs `install`; `args[0]` is its own name.
pub(crate) fn install(args: Vec<OsString>) -> ExitCode {
    crate::finish(Install::try_parse_from(args), |flags| {
        if flags.print_defaults {
            print!("{}", inject::yaml::print(&values::defaults()));
            return Ok(());
        }
        let steps = steps(&flags.common)?;
        if flags.common.dry_run {
            return print(steps.iter().flat_map(|s| &s.objects));
        }
        block_on(put(&flags, steps))
    })
}

/// Runs `uninstall`; `args[0]` is its own name.
pub(crate) fn uninstall(args: Vec<OsString>) -> ExitCode {
    crate::finish(Uninstall::try_parse_from(args), |flags| {
        if flags.common.dry_run {
            let steps = steps(&flags.common)?;
            let kept = |s: &&Step| flags.purge || !s.kept;
            return print(steps.iter().rev().filter(kept).flat_map(|s| &s.objects));
        }
        block_on(take(&flags))
    })
}

fn steps(common: &Common) -> anyhow::Result<Vec<Step>> {
    manifests::steps(&place(common, Value::Null)?)
}

/// `former`: the values of an install that this one changes.
fn place(common: &Common, former: Value) -> anyhow::Result<Place> {
    Ok(Place {
        namespace: common.access.namespace.clone(),
        revision: common.revision.clone(),
        values: Values::read(former, &common.files, &common.set)?,
    })
}

async fn put(flags: &Install, steps: Vec<Step>) -> anyhow::Result<()> {
    let client = flags.common.access.client().await?;
    let begun = Instant::now();
    apply_all(&client, &steps, flags.wait, flags.common.patience).await?;
    println!("installed in {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Applies every step; `wait` for each of them, or for those alone that the next one needs.
async fn apply_all(
    client: &Client,
    steps: &[Step],
    wait: bool,
    patience: Duration,
) -> anyhow::Result<()> {
    for step in steps {
        let started = Instant::now();
        let (mut created, mut changed) = (0, 0);
        let mut unknown = Vec::new();
        for object in &step.objects {
            match apply::apply(client, object).await {
                Ok(Outcome::Created) => created += 1,
                Ok(Outcome::Changed) => changed += 1,
                Ok(Outcome::Unchanged) => {}
                Err(e) if e.code() == Some(404) && is_optional(object) => unknown.push(object),
                Err(e) => return Err(e.into()),
            }
        }
        if !unknown.is_empty() {
            println!(
                "{:<22} this API server has no admission policies (Kubernetes 1.30): the control plane's rights to run \
                 Gateways are as wide as its roles",
                step.name
            );
        }
        // Objects of a definition cannot be made before it is established, whoever waits for the rest.
        if wait || step.must_wait {
            for object in step.objects.iter().filter(|o| !unknown.contains(o)) {
                apply::wait(client, object, patience).await?;
            }
        }
        println!(
            "{:<22} {:>2} objects, {created} new, {changed} changed  ({:.1} s)",
            step.name,
            step.objects.len(),
            started.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

/// Whether an API server that does not know the kind is served without the object.
fn is_optional(object: &Value) -> bool {
    admission::KINDS.iter().any(|kind| object["kind"] == **kind)
}

async fn take(flags: &Uninstall) -> anyhow::Result<()> {
    let client = flags.common.access.client().await?;
    // What was installed is what goes: the values tell which parts those are. Half an install has none.
    let former = upgrade::values(&client, &flags.common).await;
    let steps = manifests::steps(&place(&flags.common, former.unwrap_or(Value::Null))?)?;
    let mut gone = 0;
    for step in steps.iter().rev().filter(|s| flags.purge || !s.kept) {
        let mut removed = 0;
        for object in step.objects.iter().rev() {
            removed += usize::from(apply::delete(&client, object).await?);
        }
        for object in &step.objects {
            apply::wait_gone(&client, object, flags.common.patience).await?;
        }
        if removed > 0 {
            println!("{:<22} {removed:>2} objects removed", step.name);
        }
        gone += removed;
    }
    // What the control plane made itself.
    let namespace = &flags.common.access.namespace;
    let revision = &flags.common.revision;
    let lease_of = |name: &str| {
        let name = kubernetes::of_revision(name, revision);
        own("coordination.k8s.io/v1", "Lease", namespace, &name)
    };
    let mut made = vec![lease_of(lease::STATUS), lease_of(lease::GATEWAYS)];
    // The authority is one for all revisions.
    if others(&client, namespace).await? == 0 {
        made.push(own(
            "coordination.k8s.io/v1",
            "Lease",
            namespace,
            lease::NAMESPACES,
        ));
        made.push(own("v1", "Secret", namespace, "istio-ca-secret"));
        made.extend(own_class(&client).await?);
        gone += apply::delete_config_maps(&client, "istio-ca-root-cert").await?;
    }
    for object in &made {
        gone += usize::from(apply::delete(&client, object).await?);
    }
    println!("{gone} objects were removed");
    Ok(())
}

/// The GatewayClass, if the control plane put it in.
async fn own_class(client: &Client) -> anyhow::Result<Option<Value>> {
    let group = "gateway.networking.k8s.io/v1";
    let all = look::list(client, group, "GatewayClass", "gatewayclasses").await?;
    let is_ours = |class: &&Value| {
        let managers = class["metadata"]["managedFields"].as_array();
        class["metadata"]["name"] == control::gateway_api::DEFAULT_CLASS
            && class["spec"]["controllerName"] == control::gateway_api::CONTROLLER
            && managers
                .into_iter()
                .flatten()
                .any(|m| m["manager"] == kubernetes::FIELD_MANAGER && m["subresource"].is_null())
    };
    let mut found = all.iter().find(is_ours).cloned();
    if let Some(class) = &mut found {
        // Items of a list do not say what they are.
        class["apiVersion"] = group.into();
        class["kind"] = "GatewayClass".into();
    }
    Ok(found)
}

/// How many control planes there are in the namespace.
async fn others(client: &Client, namespace: &str) -> anyhow::Result<usize> {
    let all = look::list(client, "apps/v1", "Deployment", "deployments").await?;
    let is_one = |d: &&Value| {
        let meta = &d["metadata"];
        meta["namespace"] == *namespace && meta["labels"]["app"] == "istiod"
    };
    Ok(all.iter().filter(is_one).count())
}

fn own(api_version: &str, kind: &str, namespace: &str, name: &str) -> Value {
    json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": namespace}})
}

impl Access {
    /// A client of that cluster.
    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        let access = kubernetes::Access {
            kubeconfig: self.kubeconfig.clone(),
            context: self.context.clone(),
        };
        Ok(kubernetes::connect(&access).await?)
    }
}

fn print<'a>(objects: impl Iterator<Item = &'a Value>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for object in objects {
        // Whoever reads only the first lines closes the pipe: that is no error of ours.
        if write!(out, "---\n{}", inject::yaml::print(object)).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

pub(crate) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?
        .block_on(work)
}

fn duration(text: &str) -> Result<Duration, String> {
    config::duration_nanos(text)
        .and_then(|nanos| u64::try_from(nanos).ok())
        .map(Duration::from_nanos)
        .ok_or_else(|| format!("{text:?} is no duration; write it as in 90s or 5m0s"))
}
