//! The command line of `pilot-agent proxy`, as every release since 1.5 wrote it.
//!
//! A flag without effect here is logged; a flag nobody knows is taken like pflag's tolerant mode takes it, so that
//! a pod injected by another release still starts.

use std::collections::BTreeMap;

/// What was typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// `sidecar` or `router`; empty where it is left out.
    pub role: String,
    values: BTreeMap<String, String>,
    /// What has no effect, one line each.
    pub notes: Vec<String>,
}

/// Flags that the agent acts on.
const EFFECTIVE: &[&str] = &[
    "binaryPath",
    "concurrency",
    "configPath",
    "controlPlaneAuthPolicy",
    "discoveryAddress",
    "domain",
    "drainDuration",
    "log_output_level",
    "meshConfig",
    "parentShutdownDuration",
    "proxyAdminPort",
    "proxyComponentLogLevel",
    "proxyLogLevel",
    "serviceCluster",
    "statusPort",
    "terminationDrainDuration",
];

/// Known flags whose task is done elsewhere or that later releases dropped, and those that stand without a value.
const WITHOUT_EFFECT: &[&str] = &[
    "connectTimeout",
    "controlPlaneBootstrap",
    "disableInternalTelemetry",
    "dnsRefreshRate",
    "id",
    "ip",
    "log_as_json",
    "log_caller",
    "log_rotate",
    "log_rotate_max_age",
    "log_rotate_max_backups",
    "log_rotate_max_size",
    "log_stacktrace_level",
    "log_target",
    "mixerIdentity",
    "outlierLogPath",
    "profiling",
    "serviceregistry",
    "stsPort",
    "templateFile",
    "tokenManagerPlugin",
    "trust-domain",
    "zipkinAddress",
];

const SWITCHES: &[&str] = &[
    "controlPlaneBootstrap",
    "disableInternalTelemetry",
    "log_as_json",
    "profiling",
];

impl Flags {
    /// Reads what follows `proxy`.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Self {
        let mut out = Self::default();
        let mut args = args.into_iter().peekable();
        while let Some(arg) = args.next() {
            let Some(name) = arg.strip_prefix("--") else {
                if !arg.starts_with('-') && out.role.is_empty() {
                    out.role = arg;
                } else {
                    out.notes.push(format!("argument {arg:?} has no effect"));
                }
                continue;
            };
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None if SWITCHES.contains(&name) => (name.to_owned(), "true".to_owned()),
                None => {
                    let known = EFFECTIVE.contains(&name) || WITHOUT_EFFECT.contains(&name);
                    // A value may begin with a dash only where the flag is known to take one.
                    let value = args.next_if(|next| known || !next.starts_with('-'));
                    (name.to_owned(), value.unwrap_or_default())
                }
            };
            if WITHOUT_EFFECT.contains(&name.as_str()) {
                out.notes
                    .push(format!("flag --{name}={value} has no effect"));
            } else if !EFFECTIVE.contains(&name.as_str()) {
                out.notes
                    .push(format!("unknown flag --{name}={value} has no effect"));
            }
            out.values.insert(name, value);
        }
        out
    }

    /// The last value given to a flag.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Flags {
        Flags::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn the_long_line_of_the_old_injector_is_taken() {
        let flags = parse(
            "sidecar --domain default.svc.cluster.local --configPath /etc/istio/proxy --binaryPath /usr/local/bin/envoy \
             --serviceCluster productpage.default --drainDuration 45s --parentShutdownDuration 1m0s \
             --discoveryAddress istiod.istio-system.svc:15012 --zipkinAddress zipkin.istio-system:9411 \
             --proxyLogLevel=warning --proxyComponentLogLevel=misc:error --connectTimeout 10s --proxyAdminPort 15000 \
             --concurrency 2 --controlPlaneAuthPolicy NONE --dnsRefreshRate 300s --statusPort 15020 \
             --trust-domain=cluster.local --controlPlaneBootstrap=false",
        );
        assert_eq!(flags.role, "sidecar");
        assert_eq!(flags.value("serviceCluster"), Some("productpage.default"));
        assert_eq!(flags.value("controlPlaneAuthPolicy"), Some("NONE"));
        assert_eq!(flags.value("concurrency"), Some("2"));
        assert_eq!(flags.notes.len(), 5, "{:?}", flags.notes);
    }

    #[test]
    fn an_unknown_flag_is_noted_and_never_fatal() {
        let flags = parse("router --brandNew value --switch --log_as_json --concurrency 3");
        assert_eq!(
            (flags.role.as_str(), flags.value("concurrency")),
            ("router", Some("3"))
        );
        assert_eq!(
            flags.notes[0],
            "unknown flag --brandNew=value has no effect"
        );
        assert_eq!(flags.notes[1], "unknown flag --switch= has no effect");
    }

    #[test]
    fn the_last_of_a_repeated_flag_wins() {
        assert_eq!(
            parse("--concurrency 1 --concurrency=2").value("concurrency"),
            Some("2")
        );
    }
}
