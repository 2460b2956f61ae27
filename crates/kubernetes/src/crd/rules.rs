//! What of a definition the messages do not say: words, columns of `kubectl get`, and rules between fields (CEL).

use config::Kind;
use serde_json::{Value, json};

/// How a kind is shown to users.
pub(super) struct Shown {
    pub(super) short: &'static str,
    pub(super) about: &'static str,
    /// Name, path and description of each column.
    pub(super) columns: &'static [(&'static str, &'static str, &'static str)],
    /// Whether an object without `spec` is refused.
    pub(super) needs_spec: bool,
}

pub(super) fn shown(kind: Kind) -> Shown {
    let mut shown = Shown {
        short: "",
        about: "",
        columns: &[],
        needs_spec: false,
    };
    match kind {
        Kind::VirtualService => {
            shown.short = "vs";
            shown.about = "How requests for some hosts are routed.";
            shown.columns = &[
                (
                    "Gateways",
                    ".spec.gateways",
                    "The gateways and sidecars that take the routes.",
                ),
                ("Hosts", ".spec.hosts", "The hosts that are routed."),
            ];
        }
        Kind::DestinationRule => {
            shown.short = "dr";
            shown.about =
                "What happens to traffic for a host after routing: subsets, balancing, pools, TLS.";
            shown.columns = &[("Host", ".spec.host", "The host that this is about.")];
        }
        Kind::Gateway => {
            shown.short = "gw";
            shown.about = "The ports, protocols and hosts that a gateway serves.";
        }
        Kind::ServiceEntry => {
            shown.short = "se";
            shown.about = "Services that the platform's registry does not know.";
            shown.needs_spec = true;
            shown.columns = &[
                ("Hosts", ".spec.hosts", "The hosts of the service."),
                (
                    "Location",
                    ".spec.location",
                    "Whether it is part of the mesh.",
                ),
                (
                    "Resolution",
                    ".spec.resolution",
                    "How its addresses are found.",
                ),
            ];
        }
        Kind::WorkloadEntry => {
            shown.short = "we";
            shown.about = "A workload outside of the platform, for example on a virtual machine.";
            shown.needs_spec = true;
            shown.columns = &[("Address", ".spec.address", "Where it is.")];
        }
        Kind::WorkloadGroup => {
            shown.short = "wg";
            shown.about = "What workloads outside of the platform have in common.";
            shown.needs_spec = true;
        }
        Kind::Sidecar => shown.about = "What a sidecar takes in and what it can reach.",
        Kind::EnvoyFilter => shown.about = "Changes to the configuration that proxies are given.",
        Kind::ProxyConfig => shown.about = "Settings of proxies that need a restart.",
        Kind::PeerAuthentication => {
            shown.short = "pa";
            shown.about = "Which connections workloads accept: plaintext, mutual TLS or both.";
            shown.columns = &[("Mode", ".spec.mtls.mode", "What is accepted.")];
        }
        Kind::RequestAuthentication => {
            shown.short = "ra";
            shown.about = "The tokens that workloads accept in requests.";
        }
        Kind::AuthorizationPolicy => {
            shown.short = "ap";
            shown.about = "Who may do what with workloads.";
            shown.columns = &[("Action", ".spec.action", "What becomes of what matches.")];
        }
        Kind::Telemetry => {
            shown.short = "telemetry";
            shown.about = "Metrics, traces and access logs of workloads.";
        }
        Kind::WasmPlugin => shown.about = "WebAssembly in the filter chain of proxies.",
        Kind::TrafficExtension => shown.about = "Extensions in the filter chain of proxies.",
        _ => {}
    }
    shown
}

/// The rules between the fields of a message, in Kubernetes' expression language.
pub(super) fn of(message: &str) -> Option<Value> {
    let one_target = |fields: &[&str]| {
        let given: Vec<String> = fields
            .iter()
            .map(|f| format!("(has(self.{f}) ? 1 : 0)"))
            .collect();
        (
            format!("{} <= 1", given.join(" + ")),
            "only one of targetRefs or selector can be set".to_owned(),
        )
    };
    let (rule, why) = match message {
        "istio.security.v1beta1.AuthorizationPolicy"
        | "istio.security.v1beta1.RequestAuthentication"
        | "istio.telemetry.v1alpha1.Telemetry"
        | "istio.extensions.v1alpha1.WasmPlugin" => {
            one_target(&["selector", "targetRef", "targetRefs"])
        }
        "istio.security.v1beta1.PeerAuthentication" => (
            "has(self.portLevelMtls) ? has(self.selector) && has(self.selector.matchLabels) && \
             self.selector.matchLabels.size() > 0 : true"
                .to_owned(),
            "portLevelMtls requires selector".to_owned(),
        ),
        _ => return None,
    };
    Some(json!([{"rule": rule, "message": why}]))
}
