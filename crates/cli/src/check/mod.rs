//! `outrigger check`: what would go wrong before it does, and what is wrong with what runs.
//!
//! [`facts`] asks the cluster once; [`before`] judges whether the mesh can be installed, [`after`] whether the installed one
//! does its work. Both are functions of the facts alone.

mod after;
mod before;
mod facts;

use std::{ffi::OsString, fmt::Display, process::ExitCode};

use anyhow::bail;
use clap::Parser;
use kubernetes::look;
use serde_json::Value;

pub(crate) use self::{after::after, before::before, facts::Facts};
use crate::install::{Access, block_on};

/// Check a cluster: before an install what would break, after it what does.
///
/// Ends with 1 if errors were found.
#[derive(Debug, Parser)]
#[command(name = "outrigger check", version)]
struct Check {
    #[command(flatten)]
    access: Access,
    /// The revision that is, or will be, installed.
    #[arg(short, long, default_value = "default")]
    revision: String,
    /// Only what an install or upgrade needs, although one is there already.
    #[arg(long)]
    before: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Fine; said so that one knows what was looked at.
    Fine,
    /// It works, and something does not that one may want.
    Warning,
    /// It does not work.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) level: Level,
    pub(crate) text: String,
}

/// Runs `check`; `args[0]` is its own name.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    crate::finish(Check::try_parse_from(args), |flags| block_on(run(&flags)))
}

async fn run(flags: &Check) -> anyhow::Result<()> {
    let client = flags.access.client().await?;
    let facts = Facts::ask(&client).await?;
    let (namespace, revision) = (&flags.access.namespace, &flags.revision);
    let mut found = before(&facts, namespace, revision);
    for (group, plural) in INSTALLED {
        if !look::may(&client, "create", group, plural).await? {
            found.push(Finding::error(format!(
                "you may not create {plural}: an install needs to"
            )));
        }
    }
    if facts.control_plane(namespace, revision).is_some() && !flags.before {
        found.extend(after(&facts, namespace, revision));
    }
    print(&found);
    match errors(&found) {
        0 => Ok(()),
        n => bail!("{n} errors"),
    }
}

/// Writes all findings, the worst last, where a terminal shows them.
pub(crate) fn print(found: &[Finding]) {
    let mut sorted: Vec<&Finding> = found.iter().collect();
    sorted.sort_by_key(|f| f.level);
    for f in sorted {
        let word = match f.level {
            Level::Fine => "ok",
            Level::Warning => "warning",
            Level::Error => "error",
        };
        println!("{word:<8} {}", f.text);
    }
}

/// How many errors are among them.
pub(crate) fn errors(found: &[Finding]) -> usize {
    found.iter().filter(|f| f.level == Level::Error).count()
}

impl Finding {
    fn fine(text: impl Into<String>) -> Self {
        Finding::new(Level::Fine, text)
    }

    fn warning(text: impl Into<String>) -> Self {
        Finding::new(Level::Warning, text)
    }

    fn error(text: impl Into<String>) -> Self {
        Finding::new(Level::Error, text)
    }

    fn new(level: Level, text: impl Into<String>) -> Self {
        Finding {
            level,
            text: text.into(),
        }
    }
}

/// Text at a pointer, or empty.
fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// `NAMESPACE/NAME` of an object.
fn id(object: &Value) -> String {
    match text(object, "/metadata/namespace") {
        "" => text(object, "/metadata/name").to_owned(),
        namespace => format!("{namespace}/{}", text(object, "/metadata/name")),
    }
}

fn label<'a>(object: &'a Value, key: &str) -> &'a str {
    object["metadata"]["labels"][key]
        .as_str()
        .unwrap_or_default()
}

/// The first few of a list, and how many more there are.
fn some<T: Display>(all: &[T]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<String> = all.iter().take(SHOWN).map(T::to_string).collect();
    match all.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// What an install makes.
const INSTALLED: [(&str, &str); 10] = [
    ("", "namespaces"),
    ("", "services"),
    ("", "configmaps"),
    ("", "serviceaccounts"),
    ("apps", "deployments"),
    ("apiextensions.k8s.io", "customresourcedefinitions"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
    (
        "admissionregistration.k8s.io",
        "mutatingwebhookconfigurations",
    ),
    (
        "admissionregistration.k8s.io",
        "validatingwebhookconfigurations",
    ),
];

#[cfg(test)]
mod tests;
