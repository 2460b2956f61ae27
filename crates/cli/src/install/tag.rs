//! `outrigger tag`: names for revisions. Namespaces point to a tag (`istio.io/rev: prod`), the tag to a revision, so that
//! an upgrade changes one object instead of every namespace's label.

use std::{ffi::OsString, process::ExitCode};

use anyhow::bail;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kubernetes::{Client, apply, look};
use serde_json::{Value, json};

use super::{Access, block_on, manifests::Place, print, values::Values, webhooks};
use crate::proxy_config::table::Table;

/// Name revisions: namespaces with `istio.io/rev: TAG` are injected by the revision that the tag stands for.
#[derive(Debug, Parser)]
#[command(name = "outrigger tag", version)]
struct Tag {
    #[command(flatten)]
    access: Access,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Let a tag stand for a revision.
    Set(Set),
    /// Print what `set` would apply. The control plane writes the authority into it.
    Generate(Set),
    /// Show tags, their revisions, and the namespaces that use them.
    #[command(visible_alias = "show")]
    List {
        /// How to print it.
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// Take a tag away. New pods of its namespaces are then not injected.
    #[command(alias = "delete")]
    Remove {
        /// The tag.
        name: String,
        /// Also where namespaces use it.
        #[arg(short = 'y', long = "skip-confirmation")]
        yes: bool,
    },
}

#[derive(Debug, Args)]
struct Set {
    /// The tag.
    name: String,
    /// The revision that it stands for.
    #[arg(short, long)]
    revision: String,
    /// Change a tag that is there.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Json,
    Table,
}

/// Runs `tag`; `args[0]` is its own name.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    crate::finish(Tag::try_parse_from(args), |flags| match &flags.what {
        What::Generate(wanted) => {
            let objects = objects(&place(&flags.access, &wanted.revision)?, &wanted.name)?;
            print(objects.iter())
        }
        What::Set(wanted) => block_on(set(&flags.access, wanted)),
        What::List { output } => block_on(list(&flags.access, *output)),
        What::Remove { name, yes } => block_on(remove(&flags.access, name, *yes)),
    })
}

async fn set(access: &Access, wanted: &Set) -> anyhow::Result<()> {
    let (name, revision) = (&wanted.name, &wanted.revision);
    let place = place(access, revision)?;
    let mut objects = objects(&place, name)?;
    let client = access.client().await?;
    let found = injectors(&client).await?;
    let revisions = found.iter().filter(|c| tag_of(c).is_empty());
    let Some(of_revision) = revisions.clone().find(|c| revision_of(c) == revision) else {
        let known: Vec<&str> = revisions.map(revision_of).collect();
        bail!(
            "revision {revision} is not installed; there are: {}",
            known.join(", ")
        );
    };
    if let Some(same) = revisions.clone().find(|c| revision_of(c) == name) {
        bail!(
            "a revision is called {name} and answers for its pods ({}): take it out first, or choose another tag",
            same["metadata"]["name"].as_str().unwrap_or_default()
        );
    }
    if let Some(old) = found.iter().find(|c| tag_of(c) == name)
        && !wanted.overwrite
    {
        bail!(
            "tag {name} stands for revision {} already; give --overwrite to change that",
            revision_of(old)
        );
    }
    // Pods made in the moment before the control plane writes its authority must not be refused.
    let bundle = &of_revision["webhooks"][0]["clientConfig"]["caBundle"];
    if bundle.is_string() {
        for entry in objects[0]["webhooks"].as_array_mut().into_iter().flatten() {
            entry["clientConfig"]["caBundle"] = bundle.clone();
        }
    }
    // Rights come first: without them the bundle would not follow a rotation.
    for object in objects.iter().rev() {
        apply::apply(&client, object).await?;
    }
    println!(
        "tag {name} stands for revision {revision}: label namespaces with `kubectl label namespace NAME istio.io/rev={name}`"
    );
    Ok(())
}

async fn list(access: &Access, output: Output) -> anyhow::Result<()> {
    let client = access.client().await?;
    let found = injectors(&client).await?;
    let tags: Vec<&Value> = found.iter().filter(|c| !tag_of(c).is_empty()).collect();
    let namespaces = look::list(&client, "v1", "Namespace", "namespaces").await?;
    if output == Output::Json {
        let all: Vec<Value> = tags
            .iter()
            .map(|c| json!({"tag": tag_of(c), "revision": revision_of(c), "namespaces": users(&namespaces, tag_of(c))}))
            .collect();
        println!("{:#}", Value::from(all));
        return Ok(());
    }
    if tags.is_empty() {
        println!("No revision tags found.");
        return Ok(());
    }
    let mut table = Table::new(&["TAG", "REVISION", "NAMESPACES"]);
    for tag in tags {
        table.row(vec![
            tag_of(tag).to_owned(),
            revision_of(tag).to_owned(),
            users(&namespaces, tag_of(tag)).join(","),
        ]);
    }
    print!("{}", table.render(2));
    Ok(())
}

async fn remove(access: &Access, name: &str, yes: bool) -> anyhow::Result<()> {
    let client = access.client().await?;
    let found = injectors(&client).await?;
    let Some(tag) = found.iter().find(|c| tag_of(c) == name) else {
        bail!("there is no tag {name}");
    };
    let namespaces = look::list(&client, "v1", "Namespace", "namespaces").await?;
    let users = users(&namespaces, name);
    if !users.is_empty() && !yes {
        bail!(
            "namespaces use tag {name}: {}; their new pods would not be injected. Give -y to take it away nevertheless",
            users.join(", ")
        );
    }
    for object in objects(&place(access, revision_of(tag))?, name)? {
        apply::delete(&client, &object).await?;
    }
    println!("tag {name} is removed");
    Ok(())
}

/// The tag's webhook configuration, then the right of its revision to keep the authority in it right.
fn objects(place: &Place, tag: &str) -> anyhow::Result<Vec<Value>> {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if tag.is_empty() || tag.len() > 63 || !tag.chars().all(fine) || tag.starts_with('-') {
        bail!("tag {tag:?}: lower-case letters, digits and dashes are allowed, 63 at most");
    }
    let name = match place.namespace.as_str() {
        "istio-system" => format!("istio-revision-tag-{tag}"),
        other => format!("istio-revision-tag-{tag}-{other}"),
    };
    let mut labels = place.labels("sidecar-injector");
    labels["istio.io/tag"] = tag.into();
    let meta = json!({"name": name, "labels": labels});
    let role = format!("{name}-keeper");
    let role_meta = json!({"name": role, "labels": labels});
    let group = "rbac.authorization.k8s.io";
    Ok(vec![
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": meta,
            "webhooks": webhooks::entries(place, tag),
        }),
        json!({
            "apiVersion": format!("{group}/v1"),
            "kind": "ClusterRoleBinding",
            "metadata": role_meta,
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "ServiceAccount", "name": place.named("istiod"), "namespace": place.namespace}],
        }),
        json!({
            "apiVersion": format!("{group}/v1"),
            "kind": "ClusterRole",
            "metadata": role_meta,
            "rules": [{
                "apiGroups": ["admissionregistration.k8s.io"],
                "resources": ["mutatingwebhookconfigurations"],
                "resourceNames": [name],
                "verbs": ["patch"],
            }],
        }),
    ])
}

fn place(access: &Access, revision: &str) -> anyhow::Result<Place> {
    Ok(Place {
        namespace: access.namespace.clone(),
        revision: revision.to_owned(),
        values: Values::read(Value::Null, &[], &[])?,
    })
}

/// Every configuration that injects for a revision or a tag.
async fn injectors(client: &Client) -> anyhow::Result<Vec<Value>> {
    let all = look::list(
        client,
        "admissionregistration.k8s.io/v1",
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
    )
    .await?;
    let ours = |c: &Value| !revision_of(c).is_empty() && c["webhooks"].is_array();
    Ok(all.into_iter().filter(ours).collect())
}

fn label<'a>(object: &'a Value, key: &str) -> &'a str {
    object["metadata"]["labels"][key]
        .as_str()
        .unwrap_or_default()
}

fn revision_of(object: &Value) -> &str {
    label(object, "istio.io/rev")
}

fn tag_of(object: &Value) -> &str {
    label(object, "istio.io/tag")
}

/// The namespaces that point to a tag.
fn users<'a>(namespaces: &'a [Value], tag: &str) -> Vec<&'a str> {
    let uses = |n: &&Value| {
        label(n, "istio.io/rev") == tag
            || (tag == "default" && label(n, "istio-injection") == "enabled")
    };
    namespaces
        .iter()
        .filter(uses)
        .filter_map(|n| n["metadata"]["name"].as_str())
        .collect()
}

#[cfg(test)]
mod tests;
