//! Envoy's text and JSON forms (`/stats`).

use std::fmt::Write;

use regex::Regex;

use crate::{
    histogram::QUANTILES,
    store::{Sample, Store, Value},
};

/// Which stats a scrape shows.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Only names in which this is found.
    pub filter: Option<Regex>,
    /// Only stats that were ever touched.
    pub used_only: bool,
}

impl Query {
    pub(crate) fn take(&self, sample: &Sample) -> bool {
        (sample.used || !self.used_only)
            && self
                .filter
                .as_ref()
                .is_none_or(|filter| filter.is_match(&sample.name))
    }
}

impl Store {
    /// `name: value` lines: texts first, then counters and gauges, then histograms, each by name.
    ///
    /// Both figures of a quantile are since the start: there is no flush interval here.
    pub fn text(&self, query: &Query) -> String {
        let samples = self.samples();
        let mut out = String::new();
        for pass in 0..3 {
            for sample in samples.iter().filter(|sample| query.take(sample)) {
                // Writing to a String cannot fail.
                let _ = match &sample.value {
                    Value::Text(text) if pass == 0 => writeln!(out, "{}: \"{text}\"", sample.name),
                    Value::Counter(value) if pass == 1 => writeln!(out, "{}: {value}", sample.name),
                    Value::Gauge(value) if pass == 1 => writeln!(out, "{}: {value}", sample.name),
                    Value::Histogram(histogram) if pass == 2 && histogram.count == 0 => {
                        writeln!(out, "{}: No recorded values", sample.name)
                    }
                    Value::Histogram(histogram) if pass == 2 => {
                        let _ = write!(out, "{}:", sample.name);
                        for percent in QUANTILES {
                            let value = number(histogram.quantile(percent).unwrap_or_default());
                            let _ = write!(out, " P{percent}({value},{value})");
                        }
                        writeln!(out)
                    }
                    _ => Ok(()),
                };
            }
        }
        out
    }

    /// Envoy's `format=json`.
    pub fn json(&self, query: &Query) -> String {
        let (mut stats, mut histograms) = (String::new(), String::new());
        for sample in self.samples().iter().filter(|sample| query.take(sample)) {
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
            let quantiles = QUANTILES.map(|percent| percent.to_string()).join(",");
            if !stats.is_empty() {
                stats.push(',');
            }
            let _ = write!(
                stats,
                "{{\"histograms\":{{\"supported_quantiles\":[{quantiles}],\"computed_quantiles\":[{histograms}]}}}}"
            );
        }
        format!("{{\"stats\":[{stats}]}}")
    }
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
        };
        assert_eq!(store().text(&query), "b.total: 2\nc.active: 0\n");
    }

    #[test]
    fn json_has_envoys_shape() {
        let query = Query {
            filter: Some(Regex::new("^(version|b|t_ms)").expect("it is valid")),
            used_only: false,
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
