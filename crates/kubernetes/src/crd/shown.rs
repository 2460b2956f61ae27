//! How kinds are shown to users: words, and the columns of `kubectl get`.

use config::Kind;

/// How a kind is shown to users.
pub(super) struct Shown {
    pub(super) short: &'static str,
    pub(super) about: &'static str,
    /// Name, path and description of each column; without any, `kubectl get` shows names and ages.
    pub(super) columns: &'static [(&'static str, &'static str, &'static str)],
    /// Whether an object without `spec` is refused.
    pub(super) needs_spec: bool,
}

pub(super) fn of(kind: Kind) -> Shown {
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
                AGE,
            ];
        }
        Kind::DestinationRule => {
            shown.short = "dr";
            shown.about =
                "What happens to traffic for a host after routing: subsets, balancing, pools, TLS.";
            shown.columns = &[("Host", ".spec.host", "The host that this is about."), AGE];
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
                AGE,
            ];
        }
        Kind::WorkloadEntry => {
            shown.short = "we";
            shown.about = "A workload outside of the platform, for example on a virtual machine.";
            shown.needs_spec = true;
            shown.columns = &[AGE, ("Address", ".spec.address", "Where it is.")];
        }
        Kind::WorkloadGroup => {
            shown.short = "wg";
            shown.about = "What workloads outside of the platform have in common.";
            shown.needs_spec = true;
            shown.columns = &[AGE];
        }
        Kind::Sidecar => shown.about = "What a sidecar takes in and what it can reach.",
        Kind::EnvoyFilter => shown.about = "Changes to the configuration that proxies are given.",
        Kind::ProxyConfig => shown.about = "Settings of proxies that need a restart.",
        Kind::PeerAuthentication => {
            shown.short = "pa";
            shown.about = "Which connections workloads accept: plaintext, mutual TLS or both.";
            shown.columns = &[("Mode", ".spec.mtls.mode", "What is accepted."), AGE];
        }
        Kind::RequestAuthentication => {
            shown.short = "ra";
            shown.about = "The tokens that workloads accept in requests.";
        }
        Kind::AuthorizationPolicy => {
            shown.short = "ap";
            shown.about = "Who may do what with workloads.";
            shown.columns = &[
                ("Action", ".spec.action", "What becomes of what matches."),
                AGE,
            ];
        }
        Kind::Telemetry => {
            shown.short = "telemetry";
            shown.about = "Metrics, traces and access logs of workloads.";
            shown.columns = &[AGE];
        }
        Kind::WasmPlugin => {
            shown.about = "WebAssembly in the filter chain of proxies.";
            shown.needs_spec = true;
            shown.columns = &[AGE];
        }
        Kind::TrafficExtension => {
            shown.about = "Extensions in the filter chain of proxies.";
            shown.needs_spec = true;
            shown.columns = &[AGE];
        }
        _ => {}
    }
    shown
}

const AGE: (&str, &str, &str) = (
    "Age",
    ".metadata.creationTimestamp",
    "Time since the object was made.",
);
