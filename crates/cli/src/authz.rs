//! `outrigger authz check`: the policies that a pod's proxy has in force, in the order in which they are asked.
//!
//! What is in force is read from the proxy itself; which object, file and line is behind it, from the control plane.
//! Where the two differ the table says so.

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::{
    pod,
    proxy_config::{
        dump::{self, Dump},
        table::Table,
    },
};

/// Show what a pod's proxy lets in.
#[derive(Debug, Parser)]
#[command(name = "outrigger authz", bin_name = "outrigger authz")]
struct Authz {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The policies in force, with the object, file and line of each.
    Check(Check),
}

#[derive(Debug, Parser)]
struct Check {
    /// POD, POD.NAMESPACE, deploy/NAME[.NAMESPACE]; not needed with -f.
    #[arg(required_unless_present = "file")]
    pod: Option<String>,
    /// Namespace of the pod.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Read this config dump instead of asking a pod; - is standard input. Files and lines are not known then.
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// How to print it.
    #[arg(short, long, default_value = "table")]
    output: Output,
    /// Monitoring address of the control plane, HOST:15014; the local mesh's where it is left out.
    #[arg(long)]
    xds_address: Option<String>,
    /// Port of the proxy's admin interface.
    #[arg(long, default_value_t = 15000)]
    proxy_admin_port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Json,
    Table,
}

/// Runs the command line; `args[0]` is the command's own name.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    crate::finish(Authz::try_parse_from(args), |authz| match authz.what {
        What::Check(check) => check.run(),
    })
}

impl Check {
    fn run(self) -> anyhow::Result<()> {
        let enforced = Enforced::of(&self.dump()?);
        let known = self.known()?;
        let rows = rows(&enforced, &known);
        match self.output {
            Output::Json => println!("{}", dump::indented(&rows.iter().map(Row::json).collect())),
            Output::Table => print!("{}", table(&rows)),
        }
        Ok(())
    }

    fn dump(&self) -> anyhow::Result<Dump> {
        if let Some(file) = &self.file {
            return Dump::read(file);
        }
        let name = self.pod.as_deref().unwrap_or_default();
        let namespace = self.namespace.as_deref();
        let text = pod::admin(name, namespace, self.proxy_admin_port, "/config_dump")?;
        Dump::parse(&text, name)
    }

    /// What the control plane says that this proxy should enforce.
    fn known(&self) -> anyhow::Result<Vec<Value>> {
        let Some(name) = self.pod.as_deref().filter(|_| self.file.is_none()) else {
            return Ok(Vec::new());
        };
        let syncz = pod::control_plane(self.xds_address.as_deref(), "/debug/syncz")?;
        let proxies: Vec<Value> =
            serde_json::from_slice(&syncz).context("/debug/syncz of the control plane")?;
        let mut ids = proxies.iter().map(|p| dump::text(p, "/proxy"));
        let Some(id) = ids.find(|id| self.means(name, id)) else {
            eprintln!(
                "{name} is not connected to the control plane: files and lines are not known"
            );
            return Ok(Vec::new());
        };
        let page = format!("/debug/authz?proxyID={id}");
        let answer = pod::control_plane(self.xds_address.as_deref(), &page)?;
        serde_json::from_slice(&answer).context("/debug/authz of the control plane")
    }

    /// Whether a connected proxy, POD.NAMESPACE, is the one that was named.
    fn means(&self, name: &str, id: &str) -> bool {
        let (pod, namespace) = id.rsplit_once('.').unwrap_or((id, ""));
        let (given, given_namespace) = match name.split_once('/') {
            Some((_, rest)) => rest.split_once('.').unwrap_or((rest, "")),
            None if name == id => return true,
            None => name.split_once('.').unwrap_or((name, "")),
        };
        let wanted = match given_namespace {
            "" => self.namespace.as_deref().unwrap_or("default"),
            own => own,
        };
        let same_pod = pod == given
            || name.contains('/')
                && pod
                    .strip_prefix(given)
                    .is_some_and(|rest| rest.starts_with('-'));
        same_pod && namespace == wanted
    }
}

/// What a proxy has in force.
#[derive(Debug, Default)]
struct Enforced {
    /// Rules by action, namespace and name of their policy, each once, however many ports they are on.
    policies: BTreeMap<(String, String, String), BTreeMap<String, bool>>,
    /// Issuers whose tokens are asked for.
    issuers: Vec<String>,
}

impl Enforced {
    fn of(dump: &Dump) -> Self {
        let mut out = Self::default();
        out.walk(&dump.raw());
        out.issuers.sort();
        out.issuers.dedup();
        out
    }

    /// Filters stand in chains, chains in listeners; which port asks is not told here.
    fn walk(&mut self, value: &Value) {
        match value {
            Value::Array(list) => list.iter().for_each(|v| self.walk(v)),
            Value::Object(members) => {
                let kind = members
                    .get("@type")
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                if kind.ends_with(".rbac.v3.RBAC") {
                    let rules = |names: [&str; 2]| names.iter().find_map(|n| members.get(*n));
                    self.rules(rules(["rules", "rules"]), false);
                    self.rules(rules(["shadow_rules", "shadowRules"]), true);
                } else if kind.ends_with(".jwt_authn.v3.JwtAuthentication") {
                    let providers = members.get("providers").and_then(Value::as_object);
                    let each = providers.into_iter().flatten();
                    self.issuers
                        .extend(each.map(|(_, p)| dump::text(p, "/issuer").to_owned()));
                } else {
                    members.values().for_each(|v| self.walk(v));
                }
            }
            _ => {}
        }
    }

    fn rules(&mut self, rules: Option<&Value>, shadow: bool) {
        let Some(rules) = rules else { return };
        let action = match dump::text(rules, "/action") {
            "" => "ALLOW",
            "LOG" => "AUDIT",
            other => other,
        };
        let policies = rules.get("policies").and_then(Value::as_object);
        for name in policies.into_iter().flatten().map(|(name, _)| name) {
            let (action, dry) = match name.starts_with("istio-ext-authz-") {
                // The filter only finds out whether to ask the provider.
                true => ("CUSTOM", !shadow),
                false => (action, shadow),
            };
            let (namespace, policy, rule) = take_apart(name);
            let key = (action.to_owned(), namespace, policy);
            let known = self.policies.entry(key).or_default();
            let enforced = known.entry(rule).or_default();
            *enforced |= !dry;
        }
    }
}

/// Namespace, name and rule of `[…-]ns[NAMESPACE]-policy[NAME]-rule[INDEX]`; any other name stands for itself.
fn take_apart(name: &str) -> (String, String, String) {
    let parts = || {
        let (_, rest) = name.split_once("ns[")?;
        let (namespace, rest) = rest.split_once("]-policy[")?;
        let (policy, rest) = rest.split_once("]-rule[")?;
        let (rule, _) = rest.split_once(']')?;
        Some((namespace.to_owned(), policy.to_owned(), rule.to_owned()))
    };
    parts().unwrap_or_else(|| (String::new(), name.to_owned(), "0".to_owned()))
}

#[derive(Debug)]
struct Row {
    action: String,
    /// NAME.NAMESPACE, as istioctl writes it.
    object: String,
    rules: usize,
    dry_run: bool,
    in_force: bool,
    issuers: Vec<String>,
    source: Option<(String, u64)>,
}

impl Row {
    fn json(&self) -> Value {
        json!({
            "action": self.action,
            "object": self.object,
            "rules": self.rules,
            "dryRun": self.dry_run,
            "inForce": self.in_force,
            "issuers": self.issuers,
            "file": self.source.as_ref().map(|(file, _)| file),
            "line": self.source.as_ref().map(|(_, line)| line),
        })
    }
}

/// Joins what is in force with what should be.
fn rows(enforced: &Enforced, known: &[Value]) -> Vec<Row> {
    let mut left: BTreeMap<_, _> = enforced.policies.iter().collect();
    let mut out = Vec::new();
    for object in known {
        let text = |key: &str| dump::text(object, key).to_owned();
        let (namespace, name) = (text("/namespace"), text("/name"));
        let line = object.get("line").and_then(Value::as_u64).unwrap_or(0);
        let number = |key: &str| object.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
        let mut row = Row {
            action: text("/action"),
            object: format!("{name}.{namespace}"),
            rules: number("rules"),
            dry_run: object.get("dryRun") == Some(&Value::Bool(true)),
            in_force: false,
            issuers: Vec::new(),
            source: Some((text("/file"), line)),
        };
        if text("/kind") == "RequestAuthentication" {
            row.action = "TOKEN".to_owned();
            let issuers = object.get("issuers").and_then(Value::as_array);
            let issuers = issuers.into_iter().flatten().filter_map(Value::as_str);
            row.issuers = issuers.map(str::to_owned).collect();
            row.in_force = row.issuers.iter().all(|i| enforced.issuers.contains(i));
        } else {
            let key = (row.action.clone(), namespace, name);
            row.in_force = left.remove(&key).is_some();
        }
        out.push(row);
    }
    // In force, and nobody here knows why: from a file, or from a control plane that has changed its mind since.
    for ((action, namespace, name), rules) in left {
        out.push(Row {
            action: action.clone(),
            object: match namespace.as_str() {
                "" => name.clone(),
                namespace => format!("{name}.{namespace}"),
            },
            rules: rules.len(),
            dry_run: rules.values().all(|enforced| !enforced),
            in_force: true,
            issuers: Vec::new(),
            source: None,
        });
    }
    if known.is_empty() && !enforced.issuers.is_empty() {
        out.insert(
            0,
            Row {
                action: "TOKEN".to_owned(),
                object: "-".to_owned(),
                rules: enforced.issuers.len(),
                dry_run: false,
                in_force: true,
                issuers: enforced.issuers.clone(),
                source: None,
            },
        );
    }
    out
}

fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "no policy is in force: everybody may do everything\n".to_owned();
    }
    let mut table = Table::new(&["ACTION", "POLICY", "RULES", "IN FORCE", "ISSUERS", "SOURCE"]);
    for row in rows {
        let in_force = match (row.in_force, row.dry_run) {
            (false, _) => "not yet",
            (true, true) => "dry run",
            (true, false) => "yes",
        };
        table.row(vec![
            row.action.clone(),
            row.object.clone(),
            row.rules.to_string(),
            in_force.to_owned(),
            match &*row.issuers {
                [] => "-".to_owned(),
                issuers => issuers.join(","),
            },
            match &row.source {
                Some((file, line)) => format!("{file}:{line}"),
                None => "-".to_owned(),
            },
        ]);
    }
    table.render(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_force_is_joined_with_where_it_was_read() {
        let rbac = |more: Value| {
            let mut all = json!({ "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC" });
            all.as_object_mut()
                .expect("an object")
                .extend(more.as_object().expect("one").clone());
            json!({ "name": "envoy.filters.http.rbac", "typed_config": all })
        };
        let policies = |names: &[&str]| -> Value {
            names
                .iter()
                .map(|n| ((*n).to_owned(), json!({})))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let filters = json!([
            rbac(json!({ "shadow_rules": { "action": "DENY", "policies": policies(&["istio-ext-authz-p-ns[a]-policy[ask]-rule[0]"]) } })),
            { "name": "jwt", "typed_config": { "@type": "x/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", "providers": { "origins-0": { "issuer": "i" } } } },
            rbac(json!({ "rules": { "action": "DENY", "policies": policies(&["ns[a]-policy[no]-rule[0]", "ns[a]-policy[no]-rule[1]"]) },
                         "shadow_rules": { "action": "DENY", "policies": policies(&["ns[a]-policy[try]-rule[0]"]) } })),
            rbac(json!({ "rules": { "policies": policies(&["by-hand"]) } })),
        ]);
        let dump = json!({ "configs": [{ "@type": "x.ListenersConfigDump", "dynamic_listeners": [{ "chains": [filters.clone(), filters] }] }] });
        let dump = Dump::parse(dump.to_string().as_bytes(), "test").expect("a dump");
        let known = |kind: &str, action: Value, name: &str, dry: bool, line: u32| json!({ "kind": kind, "namespace": "a", "name": name, "action": action, "dryRun": dry, "rules": 2, "issuers": if kind == "RequestAuthentication" { json!(["i"]) } else { json!([]) }, "file": "p.yaml", "line": line });
        let known = [
            known("RequestAuthentication", Value::Null, "jwt", false, 1),
            known("AuthorizationPolicy", "CUSTOM".into(), "ask", false, 2),
            known("AuthorizationPolicy", "DENY".into(), "no", false, 3),
            known("AuthorizationPolicy", "DENY".into(), "try", true, 4),
            known("AuthorizationPolicy", "ALLOW".into(), "late", false, 5),
        ];
        assert_eq!(
            table(&rows(&Enforced::of(&dump), &known)),
            "ACTION   POLICY    RULES   IN FORCE   ISSUERS   SOURCE\n\
             TOKEN    jwt.a     2       yes        i         p.yaml:1\n\
             CUSTOM   ask.a     2       yes        -         p.yaml:2\n\
             DENY     no.a      2       yes        -         p.yaml:3\n\
             DENY     try.a     2       dry run    -         p.yaml:4\n\
             ALLOW    late.a    2       not yet    -         p.yaml:5\n\
             ALLOW    by-hand   1       yes        -         -\n"
        );
        assert_eq!(
            table(&rows(&Enforced::default(), &[])),
            "no policy is in force: everybody may do everything\n"
        );
    }
}
