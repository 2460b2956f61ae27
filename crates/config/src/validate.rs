//! Rules that an object must keep beyond its schema: those of Istio's validation webhook.
//!
//! The verdict is Istio's, object by object; the words are ours and always name the field. What Istio lets through with
//! a warning is a warning here.

mod cel;
mod destination_rule;
mod envoy_filter;
mod gateway;
mod gateway_api;
mod names;
mod security;
mod service_entry;
mod sidecar;
mod telemetry;
mod virtual_service;
mod wasm;
mod workload_group;

pub use virtual_service::GRPC_STATUS;

use std::{collections::BTreeMap, fmt::Display};

use proto::{
    Duration,
    istio::r#type::v1beta1::{PolicyTargetReference, WorkloadSelector},
};

use crate::{AnyObject, Severity};

/// One broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Errors refuse the object, warnings do not.
    pub severity: Severity,
    /// Path of the field from the object's root (`spec.http[0].route`).
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// Checks an object by the rules of its kind.
pub fn object(object: &AnyObject) -> Vec<Finding> {
    let mut report = Report::default();
    match object {
        AnyObject::VirtualService(o) => virtual_service::check(&mut report, &o.meta, &o.spec),
        AnyObject::DestinationRule(o) => destination_rule::check(&mut report, &o.meta, &o.spec),
        AnyObject::Gateway(o) => gateway::check(&mut report, &o.spec),
        AnyObject::ServiceEntry(o) => service_entry::check(&mut report, &o.meta, &o.spec),
        AnyObject::WorkloadEntry(o) => {
            service_entry::workload(&mut report, "spec", &o.spec, None, true)
        }
        AnyObject::Sidecar(o) => sidecar::check(&mut report, &o.spec),
        AnyObject::PeerAuthentication(o) => security::peer(&mut report, &o.spec),
        AnyObject::RequestAuthentication(o) => security::request(&mut report, &o.spec),
        AnyObject::AuthorizationPolicy(o) => security::authorization(&mut report, &o.spec),
        AnyObject::EnvoyFilter(o) => envoy_filter::check(&mut report, &o.spec),
        AnyObject::Telemetry(o) => telemetry::check(&mut report, &o.spec),
        AnyObject::WasmPlugin(o) => wasm::plugin(&mut report, &o.spec),
        AnyObject::TrafficExtension(o) => wasm::extension(&mut report, &o.spec),
        AnyObject::WorkloadGroup(o) => workload_group::check(&mut report, &o.spec),
        AnyObject::ProxyConfig(o) => {
            report.selector(o.spec.selector.as_ref());
            if o.spec.concurrency.is_some_and(|threads| threads < 0) {
                report.error("spec.concurrency", "must not be negative");
            }
        }
        AnyObject::GatewayClass(o) => gateway_api::class(&mut report, &o.spec),
        AnyObject::KubernetesGateway(o) => gateway_api::gateway(&mut report, &o.spec),
        AnyObject::ListenerSet(o) => gateway_api::listener_set(&mut report, &o.spec),
        AnyObject::HttpRoute(o) => gateway_api::http(&mut report, &o.spec),
        AnyObject::GrpcRoute(o) => gateway_api::grpc(&mut report, &o.spec),
        AnyObject::TlsRoute(o) => gateway_api::tls(&mut report, &o.spec),
        AnyObject::TcpRoute(o) => gateway_api::tcp(&mut report, &o.spec),
        AnyObject::ReferenceGrant(o) => gateway_api::grant(&mut report, &o.spec),
        AnyObject::BackendTlsPolicy(o) => gateway_api::backend_tls(&mut report, &o.spec),
        _ => {}
    }
    report.0
}

/// Findings as they are made.
#[derive(Debug, Default)]
pub(crate) struct Report(Vec<Finding>);

impl Report {
    fn error(&mut self, field: impl Display, message: impl Into<String>) {
        let field = field.to_string();
        self.0.push(Finding {
            severity: Severity::Error,
            field,
            message: message.into(),
        });
    }

    fn warning(&mut self, field: impl Display, message: impl Into<String>) {
        let field = field.to_string();
        self.0.push(Finding {
            severity: Severity::Warning,
            field,
            message: message.into(),
        });
    }

    /// Reports what a check of a single value says.
    fn check(&mut self, field: impl Display, result: Result<(), String>) {
        if let Err(message) = result {
            self.error(field, message);
        }
    }

    /// Durations are at least 1 ms, in whole milliseconds.
    fn duration(&mut self, field: impl Display, duration: Option<&Duration>) {
        let Some(d) = duration else { return };
        if d.seconds < 0 || d.nanos < 0 || (d.seconds == 0 && d.nanos < 1_000_000) {
            self.error(field, "must be at least 1ms");
        } else if d.nanos % 1_000_000 != 0 {
            self.error(field, "must be a whole number of milliseconds");
        }
    }

    fn port(&mut self, field: impl Display, port: u32) {
        if !(1..=65535).contains(&port) {
            self.error(field, format!("{port} is no port: give 1 to 65535"));
        }
    }

    fn percent(&mut self, field: impl Display, value: i32) {
        if !(0..=100).contains(&value) {
            self.error(field, format!("{value} is no percentage: give 0 to 100"));
        }
    }

    /// `exportTo`: namespaces, `.` (the object's own), `*` (all) and, where `nobody` says so, `~`.
    fn export_to(&mut self, namespace: &str, export_to: &[String], nobody: bool) {
        let mut seen: Vec<&str> = Vec::new();
        for (i, entry) in export_to.iter().enumerate() {
            let field = format!("spec.exportTo[{i}]");
            let key = if entry == "." { namespace } else { entry };
            if seen.contains(&key) {
                self.error(
                    field,
                    format!("{entry:?} is given twice ({key} is exported to already)"),
                );
                continue;
            }
            match key {
                "*" => {}
                "~" if nobody => {}
                _ => self.check(
                    field,
                    names::label(key).map_err(|e| format!("{e}; give a namespace, \".\" or \"*\"")),
                ),
            }
            seen.push(key);
        }
        for alone in ["*", "~"] {
            if export_to.len() > 1 && seen.contains(&alone) {
                self.error(
                    "spec.exportTo",
                    format!("{alone:?} stands for itself: remove it or everything else"),
                );
            }
        }
    }

    /// `spec.workloadSelector` of kinds of the older form.
    fn alpha_selector(&mut self, labels: &BTreeMap<String, String>) {
        if labels.is_empty() {
            self.warning(
                "spec.workloadSelector",
                "selects every workload of the namespace, because it names no labels",
            );
        }
        if labels.contains_key("") {
            self.error("spec.workloadSelector.labels", "a label needs a name");
        }
        if labels
            .iter()
            .any(|(k, v)| k.contains('*') || v.contains('*'))
        {
            self.error(
                "spec.workloadSelector.labels",
                "labels are compared as they stand: \"*\" is no wildcard here",
            );
        }
    }

    fn selector(&mut self, selector: Option<&WorkloadSelector>) {
        let Some(selector) = selector else { return };
        if selector.match_labels.is_empty() {
            self.warning(
                "spec.selector",
                "selects every workload of the namespace, because it names no labels",
            );
        }
        for (key, value) in &selector.match_labels {
            let field = format!("spec.selector.matchLabels[{key:?}]");
            if key.is_empty() {
                self.error(&field, "a label needs a name");
            }
            if key.contains('*') || value.contains('*') {
                self.error(
                    &field,
                    "labels are compared as they stand: \"*\" is no wildcard here",
                );
            }
        }
    }

    /// A policy is aimed by a selector or by references to what it targets, not by both.
    fn targets(
        &mut self,
        selector: Option<&WorkloadSelector>,
        target: Option<&PolicyTargetReference>,
        targets: &[PolicyTargetReference],
    ) {
        let given = usize::from(selector.is_some())
            + usize::from(target.is_some())
            + usize::from(!targets.is_empty());
        if given > 1 {
            self.error("spec.selector", "give either selector or targetRefs");
        }
        self.selector(selector);
        let all = target.map(|t| ("spec.targetRef".to_owned(), t));
        let listed = targets
            .iter()
            .enumerate()
            .map(|(i, t)| (format!("spec.targetRefs[{i}]"), t));
        for (field, t) in all.into_iter().chain(listed) {
            if t.name.is_empty() {
                self.error(format!("{field}.name"), "is missing");
            }
            if !t.namespace.is_empty() {
                self.error(
                    format!("{field}.namespace"),
                    "must be left out: a policy targets its own namespace",
                );
            }
            let known = matches!(
                (t.group.as_str(), t.kind.as_str()),
                ("" | "core", "Service")
                    | ("networking.istio.io", "ServiceEntry")
                    | ("gateway.networking.k8s.io", "Gateway" | "GatewayClass")
            );
            if !known {
                let message = format!(
                    "{}/{} cannot be targeted: give a Service, a ServiceEntry, or Gateway API's Gateway or GatewayClass",
                    t.group, t.kind
                );
                self.error(format!("{field}.kind"), message);
            }
        }
    }
}

#[cfg(test)]
mod tests;
