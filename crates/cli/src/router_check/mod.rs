//! `router-check`: tests of a route configuration, in the format of Envoy's route table check tool.

mod document;

use std::{ffi::OsString, fs, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context, anyhow, bail};
use clap::Parser;
use document::Assertion;
use proxy::{
    plan::RouteConfiguration,
    router::check::{Outcome, check},
};

/// Check a route configuration with tests in the format of Envoy's router_check_tool.
#[derive(Debug, Parser)]
#[command(name = "router-check")]
struct Arguments {
    /// The RouteConfiguration, YAML or JSON.
    config: PathBuf,
    /// The tests: a Validation of envoy.RouterCheckToolSchema, JSON or YAML.
    tests: PathBuf,
    /// Tell of each test which route takes its request, and why.
    #[arg(short, long)]
    details: bool,
}

/// Ends with 0 where all tests pass, 1 where one fails, 2 where there is nothing to check with.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(args) {
        Ok(arguments) => arguments,
        Err(e) => {
            // Nothing is left to do where standard error is gone, too.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    match run(&arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("Error: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs the tests and prints what failed; gives how many.
fn run(arguments: &Arguments) -> anyhow::Result<usize> {
    let routes = Arc::new(routes(&arguments.config)?);
    let path = &arguments.tests;
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let tests = document::read(&text).with_context(|| path.display().to_string())?;
    let (mut passed, mut failed) = (0, 0);
    for test in &tests {
        let outcome = check(&routes, &test.input)
            .map_err(|e| anyhow!("{}: test `{}`: input: {e}", path.display(), test.name))?;
        let mismatches = mismatches(&test.assertions, &outcome);
        match mismatches.is_empty() {
            true => passed += 1,
            false => failed += 1,
        }
        if arguments.details {
            println!("{}", test.name);
            for line in &outcome.explanation {
                println!("    {line}");
            }
        }
        for mismatch in mismatches {
            println!("{}: {mismatch}", test.name);
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed)
}

fn routes(path: &PathBuf) -> anyhow::Result<RouteConfiguration> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let message: proto::envoy::config::route::v3::RouteConfiguration =
        proto::json::from_yaml(&text).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    match RouteConfiguration::try_from(&message) {
        Ok(routes) => Ok(routes),
        Err(errors) => {
            for error in &errors.0 {
                eprintln!("{}: {error}", path.display());
            }
            bail!("{} cannot be used", path.display())
        }
    }
}

/// What is otherwise than the test expects, a line each.
fn mismatches(assertions: &[Assertion], outcome: &Outcome) -> Vec<String> {
    let text = |field: &str, expected: &str, actual: &str| {
        (expected != actual).then(|| format!("{field}: expected \"{expected}\", got \"{actual}\""))
    };
    let one = |assertion: &Assertion| match assertion {
        Assertion::ClusterName(name) => text("cluster_name", name, &outcome.cluster),
        Assertion::VirtualClusterName(name) => {
            text("virtual_cluster_name", name, &outcome.virtual_cluster)
        }
        Assertion::VirtualHostName(name) => text("virtual_host_name", name, &outcome.virtual_host),
        Assertion::PathRewrite(path) => text("path_rewrite", path, &outcome.path),
        Assertion::HostRewrite(host) => text("host_rewrite", host, &outcome.host),
        Assertion::PathRedirect(to) => text("path_redirect", to, &outcome.redirect),
        Assertion::CodeRedirect(code) => text(
            "code_redirect",
            &code.to_string(),
            &outcome.code.to_string(),
        ),
        Assertion::Timeout(timeout) => {
            let actual = outcome.timeout.unwrap_or_default();
            (*timeout != actual).then(|| format!("timeout: expected {timeout:?}, got {actual:?}"))
        }
        Assertion::RouteMetadata {
            namespace,
            key,
            value,
        } => {
            let actual = outcome.metadata.lookup(namespace, &[key]);
            let actual = actual.and_then(|v| v.as_str()).unwrap_or_default();
            text(&format!("route_metadata {namespace} {key}"), value, actual)
        }
        Assertion::RequestHeader { matcher, text } => {
            let value = match matcher.name.starts_with(':') {
                true => outcome.request.get(&matcher.name).map(Into::into),
                false => outcome.request.headers.joined(&matcher.name),
            };
            header("request_header_matches", text, value.as_deref(), |value| {
                matcher.matches_value(value)
            })
        }
        Assertion::ResponseHeader { matcher, text } => {
            let value = outcome.response.joined(&matcher.name);
            header("response_header_matches", text, value.as_deref(), |value| {
                matcher.matches_value(value)
            })
        }
    };
    assertions.iter().filter_map(one).collect()
}

fn header(
    field: &str,
    wanted: &str,
    value: Option<&[u8]>,
    matches: impl FnOnce(Option<std::borrow::Cow<'_, [u8]>>) -> bool,
) -> Option<String> {
    let actual = match value {
        Some(value) => format!("\"{}\"", String::from_utf8_lossy(value)),
        None => "no such header".to_owned(),
    };
    (!matches(value.map(Into::into))).then(|| format!("{field}: expected {wanted}, got {actual}"))
}

#[cfg(test)]
mod tests;
