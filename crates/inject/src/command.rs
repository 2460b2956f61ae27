//! `kube-inject`: the command line of this room.

use std::{
    ffi::OsString,
    fs,
    io::{Read, Write},
    process::ExitCode,
};

use clap::Parser;
use config::yaml;
use serde_json::Value;

use crate::{Error, Settings, Values, compat, compat::Release, workload};

/// Adds the sidecar to the workloads of a file; other objects pass unchanged.
#[derive(Debug, Parser)]
#[command(name = "kube-inject", args_override_self = true)]
struct Arguments {
    /// File with Kubernetes objects; `-` is standard input.
    #[arg(short, long, value_name = "FILE")]
    filename: Option<String>,
    /// Where to write; standard output if not given.
    #[arg(short, long, value_name = "FILE")]
    output: Option<String>,
    /// File with the values of the install (YAML or JSON), over the chart's defaults.
    #[arg(long = "valuesFile", value_name = "FILE")]
    values_file: Option<String>,
    /// File with the mesh's configuration, over Istio's defaults.
    #[arg(long = "meshConfigFile", value_name = "FILE")]
    mesh_config_file: Option<String>,
    /// Revision that injects.
    #[arg(short, long, default_value = "")]
    revision: String,
    /// Write the argument lists of an older release.
    #[arg(long, value_enum)]
    compat: Option<Release>,
    /// Refused: the templates are built in.
    #[arg(long = "injectConfigFile", value_name = "FILE")]
    inject_config_file: Option<String>,
    /// Refused: give --valuesFile and --meshConfigFile.
    #[arg(long = "operatorFileName", value_name = "FILE")]
    operator_file: Option<String>,
    /// Taken without effect, as are the four below: no cluster is asked.
    #[arg(long = "meshConfigMapName", value_name = "NAME")]
    mesh_config_map: Option<String>,
    /// See above.
    #[arg(long = "injectConfigMapName", value_name = "NAME", hide = true)]
    inject_config_map: Option<String>,
    /// See above.
    #[arg(long = "webhookConfig", value_name = "NAME")]
    webhook: Option<String>,
    /// See above.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    /// See above.
    #[arg(short, long = "istioNamespace", value_name = "NAME")]
    istio_namespace: Option<String>,
}

/// Runs the command; `args[0]` is its own name. Ends with 1 if an object cannot be injected, 2 for a command line that
/// cannot be read.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(args) {
        Ok(arguments) => arguments,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(e.exit_code() as u8);
        }
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("Error: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let Some(input) = &arguments.filename else {
        return Err("filename not specified (see --filename or -f)".into());
    };
    if arguments.inject_config_file.is_some() {
        return Err("--injectConfigFile: the templates are built in; leave the flag out, and choose one with the \
                    annotation inject.istio.io/templates"
            .into());
    }
    if arguments.operator_file.is_some() {
        return Err("--operatorFileName: give the values with --valuesFile and the mesh's configuration with \
                    --meshConfigFile"
            .into());
    }
    let settings = settings(arguments)?;
    let text = read(input)?;
    let mut warnings = Vec::new();
    let mut out = String::new();
    let outcome = documents(
        &text,
        input,
        &settings,
        arguments.compat,
        &mut out,
        &mut warnings,
    );
    // What was done before a mistake is written, as kube-inject does.
    match &arguments.output {
        None => std::io::stdout()
            .write_all(out.as_bytes())
            .map_err(|e| format!("-: {e}"))?,
        Some(path) => fs::write(path, out).map_err(|e| format!("{path}: {e}"))?,
    }
    if !warnings.is_empty() {
        eprintln!();
    }
    for warning in warnings {
        eprintln!("{warning}");
    }
    outcome.map_err(|e| e.to_string())
}

fn settings(arguments: &Arguments) -> Result<Settings, String> {
    let file = |path: &Option<String>| -> Result<Value, String> {
        let Some(path) = path else {
            return Ok(Value::Null);
        };
        let text = read(path)?;
        match yaml::document(&text, 1) {
            Ok(document) => Ok(document.map_or(Value::Null, |d| d.value)),
            Err(e) => Err(format!("{path}:{}: {}", e.line, e.message)),
        }
    };
    let name = |path: &Option<String>| path.clone().unwrap_or_default();
    let mut user = file(&arguments.values_file)?;
    // kube-inject always takes the shipped template, and asks pods alone whether they are injected.
    if let Some(Value::Object(webhook)) = user.get_mut("sidecarInjectorWebhook") {
        for name in [
            "neverInjectSelector",
            "alwaysInjectSelector",
            "defaultTemplates",
        ] {
            webhook.remove(name);
        }
    }
    let values =
        Values::new(&user).map_err(|e| format!("{}: {e}", name(&arguments.values_file)))?;
    let mesh = match file(&arguments.mesh_config_file)? {
        Value::Null => config::mesh::defaults(),
        user => {
            let read = config::mesh::merge(&user)
                .map_err(|e| format!("{}: {e}", name(&arguments.mesh_config_file)))?;
            for field in &read.unknown {
                eprintln!(
                    "{}: {field}: unknown field, ignored",
                    name(&arguments.mesh_config_file)
                );
            }
            read.config
        }
    };
    let mut settings = Settings::new(values, mesh);
    settings.revision = arguments.revision.clone();
    Ok(settings)
}

fn read(path: &str) -> Result<String, String> {
    let mut text = String::new();
    match path {
        "-" => std::io::stdin().read_to_string(&mut text).map(drop),
        path => fs::read_to_string(path).map(|t| text = t),
    }
    .map_err(|e| format!("{path}: {e}"))?;
    Ok(text)
}

fn documents(
    text: &str,
    file: &str,
    settings: &Settings,
    release: Option<Release>,
    out: &mut String,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    for (line, raw) in chunks(text) {
        let document = yaml::document(&raw, line).map_err(|e| Error::Syntax {
            file: file.into(),
            line: e.line,
            why: e.message,
        })?;
        let Some(document) = document else { continue };
        match workload::object(&document.value, settings, warnings)? {
            Some(mut object) => {
                if let Some(release) = release {
                    older(release, &mut object, settings);
                }
                out.push_str(&crate::yaml::print(&object));
            }
            None => {
                out.push_str(&raw);
                if !raw.ends_with('\n') {
                    out.push('\n');
                }
            }
        }
        out.push_str("---\n");
    }
    Ok(())
}

/// The documents of a file with their first lines, as kubectl separates them.
fn chunks(text: &str) -> Vec<(u32, String)> {
    let mut out = vec![(1, String::new())];
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let rest = line.strip_prefix("---").map(str::trim);
        if rest.is_some_and(|r| r.is_empty() || r.starts_with('#')) {
            out.push((number as u32 + 2, String::new()));
        } else if let Some((_, chunk)) = out.last_mut() {
            chunk.push_str(line);
        }
    }
    out
}

/// Rewrites every injected pod of an object.
fn older(release: Release, object: &mut Value, settings: &Settings) {
    for item in object["items"].as_array_mut().into_iter().flatten() {
        older(release, item, settings);
    }
    let name = object["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    for path in ["/spec/jobTemplate/spec/template", "/spec/template", ""] {
        if let Some(pod) = object.pointer_mut(path)
            && pod["spec"]["containers"].is_array()
        {
            compat::apply(release, pod, &name, settings);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "\
# the service
apiVersion: v1
kind: Service
metadata: {name: web}   # as it is
--- # next
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: ConfigMap
- apiVersion: v1
  kind: Pod
  metadata: {name: web, labels: {app: web}}
  spec: {containers: [{name: web, image: web}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: agent}
spec: {template: {spec: {hostNetwork: true, containers: [{name: a}]}}}
---
---
kind: [
";

    #[test]
    fn other_objects_pass_unchanged_and_mistakes_name_their_line() {
        let (mut out, mut warnings) = (String::new(), Vec::new());
        let settings = Settings::default();
        let outcome = documents(FILE, "app.yaml", &settings, None, &mut out, &mut warnings);
        let error = outcome.unwrap_err().to_string();
        assert!(error.starts_with("app.yaml:2"), "{error}");
        let service = FILE.split("--- # next\n").next().unwrap();
        let parts: Vec<&str> = out.split("---\n").collect();
        assert_eq!(parts[0], service);
        let list = yaml::document(parts[1], 1).unwrap().unwrap().value;
        assert_eq!(list["items"][0]["kind"], "ConfigMap");
        assert_eq!(
            list["items"][1]["spec"]["containers"][1]["name"],
            "istio-proxy"
        );
        assert_eq!(
            warnings,
            ["===> Skipping injection because Deployment \"agent\" has host networking enabled\n"]
        );
        assert!(parts[2].contains("hostNetwork: true") && !parts[2].contains("istio-proxy"));
    }

    #[test]
    fn files_of_the_install_and_an_older_release_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_string()
        };
        let app = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n\
                   spec: {template: {metadata: {labels: {app: web}}, spec: {containers: [{name: web}]}}}\n";
        let out = file("out", "");
        let args = [
            "kube-inject",
            "-f",
            &file("app.yaml", app),
            "--valuesFile",
            &file("values.yaml", "global: {hub: example.org/mesh, tag: 1}"),
            "--meshConfigFile",
            &file(
                "mesh.yaml",
                "trustDomain: td\ndefaultConfig: {concurrency: 3}",
            ),
            "-r",
            "canary",
            "--compat=1.5",
            "-o",
            &out,
        ];
        run(&Arguments::try_parse_from(args).unwrap()).unwrap();
        let text = fs::read_to_string(&out).unwrap();
        let object = yaml::document(text.strip_suffix("---\n").unwrap(), 1)
            .unwrap()
            .unwrap()
            .value;
        let pod = &object["spec"]["template"];
        assert_eq!(pod["metadata"]["annotations"]["istio.io/rev"], "canary");
        let proxy = &pod["spec"]["containers"][1];
        assert_eq!(proxy["image"], "example.org/mesh/proxyv2:1");
        let args: Vec<&str> = proxy["args"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        assert!(
            args.windows(2).any(|w| w == ["--concurrency", "3"]),
            "{args:?}"
        );
        assert!(args.contains(&"--trust-domain=td"), "{args:?}");
        let refused = ["kube-inject", "-f", "-", "--injectConfigFile", "x"];
        let error = run(&Arguments::try_parse_from(refused).unwrap()).unwrap_err();
        assert!(error.contains("inject.istio.io/templates"), "{error}");
        let bad = [
            "kube-inject",
            "-f",
            &file("bad.yaml", &app.replace("app: web", "app: 1")),
        ];
        let error = run(&Arguments::try_parse_from(bad).unwrap()).unwrap_err();
        assert!(
            error.starts_with("Deployment \"web\": metadata.labels.app: a text is expected"),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_template_is_named_with_those_that_exist() {
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, annotations: {inject.istio.io/templates: 'sidecar, x'}}\n\
                   spec: {containers: []}\n";
        let settings = Settings::default();
        let outcome = documents(
            pod,
            "-",
            &settings,
            None,
            &mut String::new(),
            &mut Vec::new(),
        );
        assert_eq!(
            outcome.unwrap_err().to_string(),
            "failed to run injection template: requested template \"x\" not found; have gateway, grpc-agent, \
             grpc-simple, sidecar"
        );
    }
    #[test]
    fn programs_are_not_sent_to_a_port_that_the_install_keeps_closed() {
        let pod = "apiVersion: v1\nkind: Pod\n\
                   metadata: {name: a, annotations: {inject.istio.io/templates: grpc-simple}}\n\
                   spec: {containers: [{name: app, image: app}]}\n";
        let injected = |values: Value| {
            let values = Values::new(&values).unwrap();
            let settings = Settings::new(values, config::mesh::defaults());
            documents(
                pod,
                "-",
                &settings,
                None,
                &mut String::new(),
                &mut Vec::new(),
            )
        };
        let closed = serde_json::json!({"pilot": {"plaintextXds": false}});
        let refused = injected(closed).unwrap_err().to_string();
        assert!(refused.contains("grpc-simple"), "{refused}");
        assert!(refused.contains("pilot.plaintextXds=true"), "{refused}");
        injected(serde_json::json!({"pilot": {"plaintextXds": true}})).unwrap();
        injected(serde_json::json!({})).unwrap();
    }
}
