//! The control plane's own metrics, under istiod's names, as Prometheus text: dashboards and alerts depend on them.

use std::{
    collections::BTreeMap,
    fmt::Write,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// All metrics. Counting takes a lock: this is the control plane, not a request's way.
#[derive(Debug)]
pub struct Metrics {
    started: Instant,
    families: Mutex<BTreeMap<&'static str, Family>>,
}

#[derive(Debug)]
struct Family {
    definition: &'static Definition,
    series: BTreeMap<String, Series>,
}

#[derive(Debug, Clone)]
enum Series {
    Number(f64),
    Histogram {
        buckets: Vec<u64>,
        sum: f64,
        count: u64,
    },
}

#[derive(Debug)]
struct Definition {
    name: &'static str,
    help: &'static str,
    form: Form,
}

#[derive(Debug, Clone, Copy)]
enum Form {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics {
            started: Instant::now(),
            families: Mutex::default(),
        }
    }
}

impl Metrics {
    /// Adds one to a counter.
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) {
        self.add(name, labels, 1.0);
    }

    /// Adds to a counter or gauge.
    pub fn add(&self, name: &str, labels: &[(&str, &str)], amount: f64) {
        self.with(name, labels, |series, _| {
            if let Series::Number(value) = series {
                *value += amount;
            }
        });
    }

    /// Sets a gauge.
    pub fn set(&self, name: &str, labels: &[(&str, &str)], to: f64) {
        self.with(name, labels, |series, _| *series = Series::Number(to));
    }

    /// Puts a duration into a histogram of seconds.
    pub fn time(&self, name: &str, labels: &[(&str, &str)], took: Duration) {
        self.observe(name, labels, took.as_secs_f64());
    }

    /// Puts a value into a histogram.
    pub fn observe(&self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.with(name, labels, |series, form| {
            if let (
                Series::Histogram {
                    buckets,
                    sum,
                    count,
                },
                Form::Histogram(bounds),
            ) = (series, form)
            {
                for (bucket, bound) in buckets.iter_mut().zip(bounds) {
                    *bucket += u64::from(value <= *bound);
                }
                *sum += value;
                *count += 1;
            }
        });
    }

    /// The value of a counter or gauge, or a histogram's count; 0 where nothing was counted.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let families = self.families.lock();
        match families
            .get(name)
            .and_then(|f| f.series.get(&label_text(labels)))
        {
            Some(Series::Number(value)) => *value,
            Some(Series::Histogram { count, .. }) => *count as f64,
            None => 0.0,
        }
    }

    fn with(&self, name: &str, labels: &[(&str, &str)], change: impl FnOnce(&mut Series, Form)) {
        let Some(definition) = DEFINITIONS.iter().find(|d| d.name == name) else {
            debug_assert!(false, "{name} is not in the table of metrics");
            return;
        };
        let mut families = self.families.lock();
        let family = families.entry(definition.name).or_insert_with(|| Family {
            definition,
            series: BTreeMap::new(),
        });
        let series =
            family
                .series
                .entry(label_text(labels))
                .or_insert_with(|| match definition.form {
                    Form::Histogram(bounds) => Series::Histogram {
                        buckets: vec![0; bounds.len()],
                        sum: 0.0,
                        count: 0,
                    },
                    Form::Counter | Form::Gauge => Series::Number(0.0),
                });
        change(series, definition.form);
    }

    /// Prometheus' text form.
    pub fn text(&self) -> String {
        self.set(
            "istiod_uptime_seconds",
            &[],
            self.started.elapsed().as_secs_f64(),
        );
        let families = self.families.lock();
        let mut out = String::new();
        for (name, family) in families.iter() {
            let kind = match family.definition.form {
                Form::Counter => "counter",
                Form::Gauge => "gauge",
                Form::Histogram(_) => "histogram",
            };
            let _ = writeln!(
                out,
                "# HELP {name} {}\n# TYPE {name} {kind}",
                family.definition.help
            );
            for (labels, series) in &family.series {
                write_series(&mut out, family.definition, labels, series);
            }
        }
        out
    }
}

fn write_series(out: &mut String, definition: &Definition, labels: &str, series: &Series) {
    let name = definition.name;
    let braces = |extra: &str| match (labels.is_empty(), extra.is_empty()) {
        (true, true) => String::new(),
        (false, true) => format!("{{{labels}}}"),
        (true, false) => format!("{{{extra}}}"),
        (false, false) => format!("{{{labels},{extra}}}"),
    };
    match (series, definition.form) {
        (Series::Number(value), _) => {
            let _ = writeln!(out, "{name}{} {value}", braces(""));
        }
        (
            Series::Histogram {
                buckets,
                sum,
                count,
            },
            Form::Histogram(bounds),
        ) => {
            for (bucket, bound) in buckets.iter().zip(bounds) {
                let _ = writeln!(
                    out,
                    "{name}_bucket{} {bucket}",
                    braces(&format!("le=\"{bound}\""))
                );
            }
            let _ = writeln!(out, "{name}_bucket{} {count}", braces("le=\"+Inf\""));
            let _ = writeln!(
                out,
                "{name}_sum{} {sum}\n{name}_count{} {count}",
                braces(""),
                braces("")
            );
        }
        (Series::Histogram { .. }, _) => {}
    }
}

fn label_text(labels: &[(&str, &str)]) -> String {
    let mut out = String::new();
    for (name, value) in labels {
        if !out.is_empty() {
            out.push(',');
        }
        let value = value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n");
        let _ = write!(out, "{name}=\"{value}\"");
    }
    out
}

/// The short name of a type in labels: `cds`, `eds` …
pub fn type_label(type_url: &str) -> String {
    xds::type_url::short(type_url).to_ascii_lowercase()
}

const LATENCY: &[f64] = &[0.01, 0.1, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];
const SHORT: &[f64] = &[0.001, 0.01, 0.1, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];
const CONVERGENCE: &[f64] = &[0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];
const SIZES: &[f64] = &[
    1.0,
    10_000.0,
    1_000_000.0,
    4_000_000.0,
    10_000_000.0,
    40_000_000.0,
];

const DEFINITIONS: &[Definition] = &[
    counter("citadel_server_csr_count", "Certificate requests received."),
    counter(
        "citadel_server_success_cert_issuance_count",
        "Certificates issued.",
    ),
    counter(
        "citadel_server_authentication_failure_count",
        "Certificate requests of callers who proved nothing.",
    ),
    counter(
        "citadel_server_csr_sign_error_count",
        "Certificate requests that were refused, by what was wrong.",
    ),
    counter(
        "sidecar_injection_requests_total",
        "Pods that the API server asked about.",
    ),
    counter("sidecar_injection_success_total", "Pods that got a proxy."),
    counter("sidecar_injection_failure_total", "Pods that were refused."),
    counter(
        "sidecar_injection_skip_total",
        "Pods that were to have no proxy.",
    ),
    gauge(
        "citadel_server_root_cert_expiry_timestamp",
        "When the certificate ends that is signed with, in seconds since 1970.",
    ),
    counter(
        "pilot_sds_certificate_errors_total",
        "Requests for secrets some of which are missing, wrong, or not for the caller.",
    ),
    counter("pilot_inbound_updates", "Changes received, by type."),
    counter(
        "pilot_push_triggers",
        "Pushes, by what made them necessary.",
    ),
    counter("pilot_xds_pushes", "Responses sent, by type."),
    counter(
        "pilot_total_xds_rejects",
        "Responses that proxies rejected, by type.",
    ),
    counter(
        "pilot_total_xds_internal_errors",
        "Errors of this control plane while it served a stream.",
    ),
    counter("pilot_xds_cds_reject", "Rejected clusters."),
    counter("pilot_xds_eds_reject", "Rejected endpoints."),
    counter("pilot_xds_lds_reject", "Rejected listeners."),
    counter("pilot_xds_rds_reject", "Rejected routes."),
    counter(
        "pilot_xds_expired_nonce",
        "Requests that answered an older response.",
    ),
    counter("istiod_connection_terminations", "Streams that ended."),
    counter(
        "istiod_connection_failures",
        "Streams that could not be served.",
    ),
    counter(
        "pilot_k8s_cfg_events",
        "Changed objects, by kind and event.",
    ),
    gauge(
        "pilot_total_rejected_configs",
        "Objects that are not in force as written.",
    ),
    gauge("pilot_xds", "Connected proxies, by version."),
    gauge("pilot_services", "Services known."),
    gauge("pilot_virt_services", "VirtualServices known."),
    gauge("pilot_info", "The version of this control plane."),
    gauge("istiod_uptime_seconds", "Time since the start."),
    histogram(
        "pilot_debounce_time",
        "From the first change of a batch to the end of building the mesh.",
        LATENCY,
    ),
    histogram(
        "pilot_pushcontext_init_seconds",
        "Time to build the mesh from the objects.",
        SHORT,
    ),
    histogram(
        "pilot_proxy_queue_time",
        "How long a push waited for its turn.",
        CONVERGENCE,
    ),
    histogram(
        "pilot_proxy_convergence_time",
        "From a change to its last response handed to the stream.",
        CONVERGENCE,
    ),
    histogram(
        "pilot_xds_push_time",
        "Time to make the resources of a response, by type.",
        LATENCY,
    ),
    histogram(
        "pilot_xds_send_time",
        "Time to hand a response to the stream.",
        LATENCY,
    ),
    histogram(
        "pilot_xds_config_size_bytes",
        "Size of responses, by type.",
        SIZES,
    ),
];

const fn counter(name: &'static str, help: &'static str) -> Definition {
    Definition {
        name,
        help,
        form: Form::Counter,
    }
}

const fn gauge(name: &'static str, help: &'static str) -> Definition {
    Definition {
        name,
        help,
        form: Form::Gauge,
    }
}

const fn histogram(name: &'static str, help: &'static str, bounds: &'static [f64]) -> Definition {
    Definition {
        name,
        help,
        form: Form::Histogram(bounds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_what_prometheus_reads() {
        let metrics = Metrics::default();
        metrics.count("pilot_xds_pushes", &[("type", "cds")]);
        metrics.count("pilot_xds_pushes", &[("type", "cds")]);
        metrics.set("pilot_info", &[("version", "a\"b")], 1.0);
        metrics.time(
            "pilot_proxy_convergence_time",
            &[],
            Duration::from_millis(300),
        );
        let text = metrics.text();
        for line in [
            "# TYPE pilot_xds_pushes counter",
            "pilot_xds_pushes{type=\"cds\"} 2",
            "pilot_info{version=\"a\\\"b\"} 1",
            "pilot_proxy_convergence_time_bucket{le=\"0.1\"} 0",
            "pilot_proxy_convergence_time_bucket{le=\"0.5\"} 1",
            "pilot_proxy_convergence_time_bucket{le=\"+Inf\"} 1",
            "pilot_proxy_convergence_time_sum 0.3",
            "pilot_proxy_convergence_time_count 1",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
        assert_eq!(metrics.value("pilot_xds_pushes", &[("type", "cds")]), 2.0);
    }
}
