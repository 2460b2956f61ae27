//! Envoy's text and JSON forms (`/stats`).

use std::fmt::Write;

use regex::Regex;

use crate::{
    histogram::{Distribution, QUANTILES},
    store::{Kind, Store, Value},
};

/// Which stats a scrape shows.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Only names in which this is found.
    pub filter: Option<Regex>,
    /// Only stats that were ever touched.
    pub used_only: bool,
    /// Only stats of this kind.
    pub kind: Option<Kind>,
    /// What is shown of a histogram.
    pub histograms: HistogramView,
}

/// `histogram_buckets`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HistogramView {
    /// Quantiles.
    #[default]
    Summary,
    /// For each upper bound the values that are at most that.
    Cumulative,
    /// For each upper bound the values between it and the one before.
    Disjoint,
}

impl Query {
    pub(crate) fn wants(&self, name: &str, kind: Kind) -> bool {
        self.kind.is_none_or(|wanted| wanted == kind)
            && self
                .filter
                .as_ref()
                .is_none_or(|filter| filter.is_match(name))
    }
}

impl Store {
    /// `name: value` lines: texts first, then counters and gauges, then histograms, each by name.
    ///
    /// Both figures of a quantile are since the start: there is no flush interval here.
    pub fn text(&self, query: &Query) -> String {
        let samples = self.samples_of(query);
        let (mut texts, mut numbers, mut histograms) = (
            String::new(),
            String::with_capacity(samples.len() * 64),
            String::new(),
        );
        let mut digits = itoa::Buffer::new();
        for sample in &samples {
            let name = &*sample.name;
            let mut line = |value: &str| {
                numbers.extend([name, ": ", value, "\n"]);
            };
            match &sample.value {
                // Writing to a String cannot fail.
                Value::Text(text) => drop(writeln!(texts, "{name}: \"{text}\"")),
                Value::Counter(value) => line(digits.format(*value)),
                Value::Gauge(value) => line(digits.format(*value)),
                Value::Histogram(histogram) => {
                    histograms.extend([name, ":"]);
                    histogram_text(
                        &mut histograms,
                        histogram,
                        self.bounds(name),
                        query.histograms,
                    );
                    histograms.push('\n');
                }
            }
        }
        texts.push_str(&numbers);
        texts.push_str(&histograms);
        texts
    }

    /// Envoy's `format=json`.
    pub fn json(&self, query: &Query) -> String {
        let (mut stats, mut histograms) = (String::new(), String::new());
        for sample in &self.samples_of(query) {
            let out = if matches!(sample.value, Value::Histogram(_)) {
                &mut histograms
            } else {
                &mut stats
            };
            if !out.is_empty() {
                out.push(',');
            }
            out.push_str("{\"name\":");
            quote(out, &sample.name);
            match &sample.value {
                Value::Counter(value) => drop(write!(out, ",\"value\":{value}}}")),
                Value::Gauge(value) => drop(write!(out, ",\"value\":{value}}}")),
                Value::Text(text) => {
                    out.push_str(",\"value\":");
                    quote(out, text);
                    out.push('}');
                }
                Value::Histogram(histogram) if query.histograms != HistogramView::Summary => {
                    out.push_str(",\"buckets\":[");
                    for (index, (bound, count)) in
                        bounds(histogram, self.bounds(&sample.name), query.histograms).enumerate()
                    {
                        let comma = if index == 0 { "" } else { "," };
                        let _ = write!(
                            out,
                            "{comma}{{\"upper_bound\":{bound},\"interval\":{count},\"cumulative\":{count}}}"
                        );
                    }
                    out.push_str("]}");
                }
                Value::Histogram(histogram) => {
                    out.push_str(",\"values\":[");
                    for (index, percent) in QUANTILES.into_iter().enumerate() {
                        let value = histogram
                            .quantile(percent)
                            .map_or("null".to_owned(), number);
                        let comma = if index == 0 { "" } else { "," };
                        let _ = write!(
                            out,
                            "{comma}{{\"interval\":{value},\"cumulative\":{value}}}"
                        );
                    }
                    out.push_str("]}");
                }
            }
        }
        if !histograms.is_empty() {
            let comma = if stats.is_empty() { "" } else { "," };
            if query.histograms != HistogramView::Summary {
                return format!("{{\"stats\":[{stats}{comma}{{\"histograms\":[{histograms}]}}]}}");
            }
            let quantiles = QUANTILES.map(|percent| percent.to_string()).join(",");
            let _ = write!(
                stats,
                "{comma}{{\"histograms\":{{\"supported_quantiles\":[{quantiles}],\"computed_quantiles\":[{histograms}]}}}}"
            );
        }
        format!("{{\"stats\":[{stats}]}}")
    }
}

fn histogram_text(out: &mut String, histogram: &Distribution, upper: &[f64], view: HistogramView) {
    // Writing to a String cannot fail.
    if view != HistogramView::Summary {
        for (bound, count) in bounds(histogram, upper, view) {
            let _ = write!(out, " B{bound}({count},{count})");
        }
    } else if histogram.count == 0 {
        out.push_str(" No recorded values");
    } else {
        for percent in QUANTILES {
            let value = number(histogram.quantile(percent).unwrap_or_default());
            let _ = write!(out, " P{percent}({value},{value})");
        }
    }
}

/// Each upper bound with its count.
fn bounds(
    histogram: &Distribution,
    upper: &[f64],
    view: HistogramView,
) -> impl Iterator<Item = (f64, u64)> {
    let mut below = 0;
    upper.iter().map(move |&bound| {
        let most = histogram.at_most(bound);
        let before = std::mem::replace(&mut below, most);
        match view {
            HistogramView::Disjoint => (bound, most - before),
            _ => (bound, most),
        }
    })
}

/// A quantile without the noise of binary fractions.
fn number(value: f64) -> String {
    let rounded = (value * 10_000.0).round() / 10_000.0;
    rounded.to_string()
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            '\n' => out.push_str("\\n"),
            character if (character as u32) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", character as u32);
            }
            character => out.push(character),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> Store {
        let store = Store::default();
        let stats = store.stats();
        stats.counter("b.total").add(2);
        stats.counter("a.total");
        stats.gauge("c.active").set(0);
        stats.text("version").set("v\"1");
        stats.histogram("t_ms").record(1);
        stats.histogram("u_ms");
        store
    }

    #[test]
    fn text_is_envoys() {
        assert_eq!(
            store().text(&Query::default()),
            "version: \"v\"1\"\na.total: 0\nb.total: 2\nc.active: 0\n\
             t_ms: P0(1,1) P25(1.025,1.025) P50(1.05,1.05) P75(1.075,1.075) P90(1.09,1.09) P95(1.095,1.095) \
             P99(1.099,1.099) P99.5(1.0995,1.0995) P99.9(1.0999,1.0999) P100(1.1,1.1)\nu_ms: No recorded values\n"
        );
    }

    #[test]
    fn a_query_leaves_out() {
        let query = Query {
            filter: Some(Regex::new("total|active").expect("it is valid")),
            used_only: true,
            ..Query::default()
        };
        assert_eq!(store().text(&query), "b.total: 2\nc.active: 0\n");
    }

    #[test]
    fn a_kind_is_shown_alone_and_histograms_by_their_bounds() {
        let query = |kind, histograms| Query {
            kind: Some(kind),
            histograms,
            ..Query::default()
        };
        let store = store();
        assert_eq!(
            store.text(&query(Kind::Gauge, HistogramView::Summary)),
            "c.active: 0\n"
        );
        let text = store.text(&query(Kind::Histogram, HistogramView::Cumulative));
        assert!(
            text.starts_with("t_ms: B0.5(0,0) B1(1,1) B5(1,1) "),
            "{text}"
        );
        let text = store.text(&query(Kind::Histogram, HistogramView::Disjoint));
        assert!(
            text.starts_with("t_ms: B0.5(0,0) B1(1,1) B5(0,0) "),
            "{text}"
        );
        let json = store.json(&query(Kind::Histogram, HistogramView::Disjoint));
        assert!(
            json.starts_with(
                r#"{"stats":[{"histograms":[{"name":"t_ms","buckets":[{"upper_bound":0.5,"interval":0,"cumulative":0},"#
            ),
            "{json}"
        );
    }

    #[test]
    fn many_stats_are_all_printed() {
        let store = Store::default();
        let stats = store.stats();
        for cluster in 0..10_000 {
            let scope = stats.scope(&format!(
                "cluster.outbound|80||s{cluster}.ns.svc.cluster.local."
            ));
            for name in [
                "membership_total",
                "membership_healthy",
                "upstream_cx_active",
            ] {
                scope.gauge(name).set(1);
            }
            for name in ["upstream_rq_total", "upstream_rq_200", "upstream_cx_total"] {
                scope.counter(name).inc();
            }
        }
        let start = std::time::Instant::now();
        let text = store.text(&Query::default());
        let took = start.elapsed();
        assert_eq!(text.lines().count(), 60_000);
        println!("{} bytes in {took:?}", text.len());
    }

    #[test]
    fn json_has_envoys_shape() {
        let query = Query {
            filter: Some(Regex::new("^(version|b|t_ms)").expect("it is valid")),
            ..Query::default()
        };
        let json = store().json(&query);
        assert!(
            json.starts_with(
                r#"{"stats":[{"name":"b.total","value":2},{"name":"version","value":"v\"1"},"#
            ),
            "{json}"
        );
        assert!(
            json.contains(r#""supported_quantiles":[0,25,50,75,90,95,99,99.5,99.9,100]"#),
            "{json}"
        );
        assert!(
            json.contains(r#"{"name":"t_ms","values":[{"interval":1,"cumulative":1}"#),
            "{json}"
        );
    }
}
