//! `router-check`: tests of a route configuration, in the format of Envoy's route table check tool.

mod coverage;
mod document;
mod text_format;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, anyhow, bail};
use clap::Parser;
use coverage::Coverage;
use document::{Assertion, Format};
use proxy::{
    plan::RouteConfiguration,
    router::check::{Outcome, check},
};

/// Check a route configuration with tests in the format of Envoy's router_check_tool.
#[derive(Debug, Default, Parser)]
#[command(name = "router-check")]
struct Arguments {
    /// The RouteConfiguration, YAML or JSON.
    #[arg(required_unless_present = "config_path")]
    config: Option<PathBuf>,
    /// The tests: a Validation of envoy.RouterCheckToolSchema, JSON, YAML or protobuf's text format (.pb_text).
    #[arg(required_unless_present = "test_path")]
    tests: Option<PathBuf>,
    /// The RouteConfiguration, as Envoy's tool takes it.
    #[arg(short, long, value_name = "CONFIG", conflicts_with_all = ["config", "tests"], requires = "test_path")]
    config_path: Option<PathBuf>,
    /// The tests, as Envoy's tool takes them.
    #[arg(short, long, value_name = "TESTS", conflicts_with_all = ["config", "tests"], requires = "config_path")]
    test_path: Option<PathBuf>,
    /// Tell of each test which route takes its request, and why.
    #[arg(short, long)]
    details: bool,
    /// Give details of failed tests alone.
    #[arg(long)]
    only_show_failures: bool,
    /// Fail where tests look at less than this share of the routes, in percent.
    #[arg(short, long, value_name = "PERCENT")]
    fail_under: Option<f64>,
    /// Count a route as far as all its fields are tested, and name the routes without tests.
    #[arg(long)]
    covall: bool,
    /// Name the routes without tests.
    #[arg(long)]
    detailed_coverage: bool,
    /// For scripts that give it to Envoy's tool: fields that are deprecated are no error here.
    #[arg(long)]
    disable_deprecation_check: bool,
}

impl Arguments {
    fn config(&self) -> anyhow::Result<&Path> {
        let path = self.config.as_deref().or(self.config_path.as_deref());
        path.context("CONFIG is missing")
    }

    fn tests(&self) -> anyhow::Result<&Path> {
        let path = self.tests.as_deref().or(self.test_path.as_deref());
        path.context("TESTS is missing")
    }
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
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("Error: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs the tests and prints what failed; tells whether all is well.
fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let routes = Arc::new(routes(arguments.config()?)?);
    let path = arguments.tests()?;
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let format = match path.extension() {
        Some(extension) if extension == "pb_text" => Format::ProtobufText,
        _ => Format::Yaml,
    };
    let tests = document::read(&text, format).with_context(|| path.display().to_string())?;
    let mut coverage = Coverage::default();
    let (mut passed, mut failed) = (0, 0);
    for test in &tests {
        let outcome = check(&routes, &test.input)
            .map_err(|e| anyhow!("{}: test `{}`: input: {e}", path.display(), test.name))?;
        let mut mismatches = Vec::new();
        for assertion in &test.assertions {
            match (mismatch(assertion, &outcome), outcome.place) {
                (Some(mismatch), _) => mismatches.push(mismatch),
                (None, Some(place)) => coverage.met(&routes, place, assertion),
                (None, None) => {}
            }
        }
        match mismatches.is_empty() {
            true => passed += 1,
            false => failed += 1,
        }
        if arguments.details && !(arguments.only_show_failures && mismatches.is_empty()) {
            println!("{}", test.name);
            for line in &outcome.explanation {
                println!("    {line}");
            }
        }
        for mismatch in mismatches {
            println!("{}: {mismatch}", test.name);
        }
    }
    let covered = covered(arguments, &routes, &coverage);
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0 && covered)
}

/// Prints the coverage where it was asked for; tells whether it is enough.
fn covered(arguments: &Arguments, routes: &RouteConfiguration, coverage: &Coverage) -> bool {
    if arguments.covall || arguments.detailed_coverage {
        for line in coverage.missing(routes) {
            println!("{line}");
        }
    } else if arguments.fail_under.is_none() {
        return true;
    }
    let percent = coverage.percent(routes, arguments.covall);
    println!("Current route coverage: {percent}%");
    let wanted = arguments.fail_under.unwrap_or(0.0);
    let enough = percent >= wanted;
    if !enough {
        println!("Failed to meet coverage requirement: {wanted}%");
    }
    enough
}

fn routes(path: &Path) -> anyhow::Result<RouteConfiguration> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut message: proto::envoy::config::route::v3::RouteConfiguration =
        proto::json::from_envoy_yaml(&text).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    switch_on(&mut message);
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

/// A route that takes no request unless runtime says so takes those with the random number 0 here, as in Envoy's tool:
/// else no test could reach it.
fn switch_on(routes: &mut proto::envoy::config::route::v3::RouteConfiguration) {
    let hosts = routes.virtual_hosts.iter_mut();
    for route in hosts.flat_map(|host| &mut host.routes) {
        let matches = route.r#match.as_mut();
        let fraction = matches.and_then(|m| m.runtime_fraction.as_mut());
        if let Some(share) = fraction.and_then(|f| f.default_value.as_mut())
            && share.numerator == 0
        {
            share.numerator = 1;
        }
    }
}

/// What is otherwise than a test expects.
fn mismatch(assertion: &Assertion, outcome: &Outcome) -> Option<String> {
    let text = |field: &str, expected: &str, actual: &str| {
        (expected != actual).then(|| format!("{field}: expected \"{expected}\", got \"{actual}\""))
    };
    let field = |field: &str, name: &str, expected: &str, actual: Option<&[u8]>| {
        let actual = String::from_utf8_lossy(actual.unwrap_or_default());
        text(&format!("{field} {name}"), expected, &actual)
    };
    match assertion {
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
            (timeout.as_millis() != actual.as_millis())
                .then(|| format!("timeout: expected {timeout:?}, got {actual:?}"))
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
        Assertion::RequestHeaderField { name, value } => {
            let actual = match name.starts_with(':') {
                true => outcome.request.get(name),
                false => outcome.request.headers.get(name),
            };
            field("request_header_fields", name, value, actual)
        }
        Assertion::ResponseHeaderField { name, value } => {
            let actual = outcome.response.get(name);
            field("response_header_fields", name, value, actual)
        }
        Assertion::RequestHeader { matcher, text } => {
            let request = &outcome.request;
            let (value, meets) = match matcher.name.starts_with(':') {
                true => {
                    let value = request.get(&matcher.name);
                    (value.map(Into::into), matcher.matches_value(value))
                }
                false => (
                    request.headers.joined(&matcher.name),
                    matcher.matches_request(&request.headers),
                ),
            };
            header("request_header_matches", text, value.as_deref(), meets)
        }
        Assertion::ResponseHeader { matcher, text } => {
            let value = outcome.response.joined(&matcher.name);
            let meets = matcher.matches_response(&outcome.response);
            header("response_header_matches", text, value.as_deref(), meets)
        }
    }
}

fn header(field: &str, wanted: &str, value: Option<&[u8]>, meets: bool) -> Option<String> {
    let actual = match value {
        Some(value) => format!("\"{}\"", String::from_utf8_lossy(value)),
        None => "no such header".to_owned(),
    };
    (!meets).then(|| format!("{field}: expected {wanted}, got {actual}"))
}

#[cfg(test)]
mod tests;
