//! The Prometheus form (`/stats/prometheus`): Envoy's names with `envoy_` before them, tags as labels.

use std::{collections::BTreeMap, fmt::Write};

use crate::{
    store::{Sample, Store, Value},
    tags::Tagged,
    text::Query,
};

/// Prefixes whose names are printed without the prefix and without `envoy_`, as Envoy does for namespaces that
/// extensions register.
const NAMESPACES: [&str; 2] = ["istiocustom.", "wasmcustom."];

/// The kind of a name, and the stats that share it.
type Family<'a> = (&'static str, Vec<(Tagged, &'a Sample)>);

impl Store {
    /// All stats that the query takes, grouped by name with one `# TYPE` line each. Texts have no Prometheus form.
    pub fn prometheus(&self, query: &Query) -> String {
        let samples = self.samples_of(query);
        let mut families: BTreeMap<String, Family<'_>> = BTreeMap::new();
        for sample in &samples {
            let kind = match sample.value {
                Value::Counter(_) => "counter",
                Value::Gauge(_) => "gauge",
                Value::Histogram(_) => "histogram",
                Value::Text(_) => continue,
            };
            let tagged = self.tagged(sample);
            let family = families
                .entry(metric_name(&tagged.name))
                .or_insert((kind, Vec::new()));
            // Two stats that end up under one name but differ in kind cannot share a family.
            if family.0 == kind {
                family.1.push((tagged, sample));
            }
        }
        let mut out = String::new();
        for (name, (kind, members)) in families {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "# TYPE {name} {kind}");
            for (tagged, sample) in members {
                let labels = labels(&tagged);
                let _ = match &sample.value {
                    Value::Counter(value) => writeln!(out, "{name}{{{labels}}} {value}"),
                    Value::Gauge(value) => writeln!(out, "{name}{{{labels}}} {value}"),
                    Value::Histogram(histogram) => {
                        let comma = if labels.is_empty() { "" } else { "," };
                        for &bound in self.bounds(&sample.name) {
                            let count = histogram.at_most(bound);
                            let _ = writeln!(
                                out,
                                "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}"
                            );
                        }
                        let (count, sum) = (histogram.count, histogram.sum);
                        let _ =
                            writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}");
                        let _ = writeln!(out, "{name}_sum{{{labels}}} {sum}");
                        writeln!(out, "{name}_count{{{labels}}} {count}")
                    }
                    Value::Text(_) => Ok(()),
                };
            }
        }
        out
    }
}

fn metric_name(name: &str) -> String {
    match NAMESPACES
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
    {
        Some(own) => sanitize(own),
        None => format!("envoy_{}", sanitize(name)),
    }
}

/// Prometheus takes letters, digits, `_` and, in names, a leading letter; `.` and the rest become `_`.
fn sanitize(name: &str) -> String {
    let mut out: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '_' || c == ':' {
                c
            } else {
                '_'
            }
        })
        .collect();
    if out.starts_with(|c: char| c.is_ascii_digit()) {
        out.insert(0, '_');
    }
    out
}

fn labels(tagged: &Tagged) -> String {
    let mut out = String::new();
    for (tag, value) in tagged.tags.iter() {
        if !out.is_empty() {
            out.push(',');
        }
        out.push_str(&sanitize(tag));
        out.push_str("=\"");
        for character in value.chars() {
            match character {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                character => out.push(character),
            }
        }
        out.push('"');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_one_type_line_and_labels() {
        let store = Store::default();
        let stats = store.stats();
        stats.counter("cluster.b.upstream_rq_200").add(3);
        stats.counter("cluster.a.upstream_rq_503").add(1);
        stats.text("version").set("x");
        stats
            .tagged_counter(
                "istiocustom.istio_requests_total",
                &[("reporter", "source"), ("quoted", "a\"b")],
            )
            .inc();
        assert_eq!(
            store.prometheus(&Query::default()),
            "# TYPE envoy_cluster_upstream_rq counter\n\
             envoy_cluster_upstream_rq{envoy_response_code=\"503\",envoy_cluster_name=\"a\"} 1\n\
             envoy_cluster_upstream_rq{envoy_response_code=\"200\",envoy_cluster_name=\"b\"} 3\n\
             # TYPE istio_requests_total counter\n\
             istio_requests_total{reporter=\"source\",quoted=\"a\\\"b\"} 1\n"
        );
    }

    #[test]
    fn the_bounds_of_a_histogram_are_those_of_the_first_rule_that_takes_its_name() {
        let store = Store::default();
        let times: crate::Matcher = std::sync::Arc::new(|name: &str| name.ends_with("_time"));
        let all: crate::Matcher = std::sync::Arc::new(|_: &str| true);
        store.configure_buckets(vec![(times, vec![2.0, 20.0]), (all, vec![7.0])]);
        let stats = store.stats();
        stats.histogram("cluster.a.upstream_rq_time").record(3);
        stats.histogram("cluster.a.upstream_cx_length_ms").record(3);
        let query = Query {
            histograms: crate::HistogramView::Cumulative,
            ..Query::default()
        };
        assert_eq!(
            store.text(&query),
            "cluster.a.upstream_cx_length_ms: B7(1,1)\n\
             cluster.a.upstream_rq_time: B2(0,0) B20(1,1)\n"
        );
        let text = store.prometheus(&Query::default());
        let bounds: Vec<_> = text
            .lines()
            .filter(|line| line.contains("_time_bucket"))
            .collect();
        assert_eq!(bounds.len(), 3, "{text}");
        assert!(bounds[1].ends_with("le=\"20\"} 1"), "{text}");
    }

    #[test]
    fn histograms_are_cumulative() {
        let store = Store::default();
        let histogram = store.stats().histogram("cluster.a.upstream_rq_time");
        for value in [1, 3, 7, 5000] {
            histogram.record(value);
        }
        let text = store.prometheus(&Query::default());
        for line in [
            "envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"a\",le=\"0.5\"} 0",
            "envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"a\",le=\"5\"} 2",
            "envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"a\",le=\"+Inf\"} 4",
            "envoy_cluster_upstream_rq_time_sum{envoy_cluster_name=\"a\"} 5011",
            "envoy_cluster_upstream_rq_time_count{envoy_cluster_name=\"a\"} 4",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is missing in\n{text}"
            );
        }
    }
}
