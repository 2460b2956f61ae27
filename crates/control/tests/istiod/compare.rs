//! `compare.py` in Rust: differences by path, and the patterns of differences that are known.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::Value;

/// Accidents of one run, not of the translation.
const ALWAYS: &[&str] = &["endpoints/outbound|443||kubernetes.default*/*", "*/*/@type"];

/// Patterns of differences that are not counted.
pub(crate) struct Ignore(Vec<String>);

impl Ignore {
    /// The fixed ones, and those of `docs/istiod-differences.txt`.
    pub(crate) fn read() -> Self {
        let path = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../docs/istiod-differences.txt"
        ));
        let own = fs::read_to_string(path).unwrap_or_default();
        let own = own
            .lines()
            .map(|l| l.split('#').next().unwrap_or_default().trim())
            .filter(|l| !l.is_empty());
        Self(
            ALWAYS
                .iter()
                .copied()
                .chain(own)
                .map(str::to_owned)
                .collect(),
        )
    }

    fn has(&self, path: &str) -> bool {
        self.0
            .iter()
            .any(|pattern| glob(pattern.as_bytes(), path.as_bytes()))
    }
}

/// What a comparison found.
#[derive(Default)]
pub(crate) struct Score {
    pub(crate) equal: usize,
    pub(crate) all: usize,
    pub(crate) known: usize,
    pub(crate) differences: Vec<String>,
}

impl Score {
    pub(crate) fn add(&mut self, other: Score) {
        self.equal += other.equal;
        self.all += other.all;
        self.known += other.known;
    }
}

/// Compares two lists of resources by name.
pub(crate) fn compare(section: &str, want: &[Value], got: &[Value], ignore: &Ignore) -> Score {
    let (want, got) = (by_name(want), by_name(got));
    let mut names: Vec<_> = want.keys().chain(got.keys()).collect();
    names.sort();
    names.dedup();
    let mut score = Score::default();
    for name in names {
        let mut found = Vec::new();
        match (want.get(name), got.get(name)) {
            (Some(want), Some(got)) => diff(want, got, String::new(), &mut found),
            (Some(_), None) => found.push((String::new(), "present".into(), Value::Null)),
            (None, _) => found.push((String::new(), Value::Null, "present".into())),
        }
        let before = found.len();
        found.retain(|(path, ..)| !ignore.has(&format!("{section}/{name}/{path}")));
        score.known += before - found.len();
        score.all += 1;
        score.equal += usize::from(found.is_empty());
        score
            .differences
            .extend(found.into_iter().map(|(path, want, got)| {
                format!(
                    "{section}/{name}/{path}\n    istiod: {}\n    ours:   {}",
                    short(&want),
                    short(&got)
                )
            }));
    }
    score
}

fn by_name(list: &[Value]) -> BTreeMap<String, &Value> {
    let name = |v: &Value| {
        let of = |key: &str| {
            v.get(key)
                .and_then(Value::as_str)
                .filter(|n| !n.is_empty())
                .map(str::to_owned)
        };
        of("name").or_else(|| of("clusterName")).unwrap_or_default()
    };
    list.iter().map(|v| (name(v), v)).collect()
}

fn diff(want: &Value, got: &Value, path: String, out: &mut Vec<(String, Value, Value)>) {
    match (want, got) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<_> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                match (a.get(key), b.get(key)) {
                    (Some(a), Some(b)) => diff(a, b, path, out),
                    (a, b) => out.push((
                        path,
                        a.cloned().unwrap_or_default(),
                        b.cloned().unwrap_or_default(),
                    )),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            if a.len() != b.len() {
                out.push((format!("{path}[len]"), a.len().into(), b.len().into()));
            }
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                diff(a, b, format!("{path}[{i}]"), out);
            }
        }
        (Value::Number(a), Value::Number(b)) if a.as_f64() == b.as_f64() => {}
        _ if want == got => {}
        _ => out.push((path, want.clone(), got.clone())),
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.len() < 300 {
        text
    } else {
        format!("{}…", text.chars().take(297).collect::<String>())
    }
}

/// `*` stands for anything, `?` for one byte.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=text.len()).any(|i| glob(rest, &text[i..])),
        ([b'?', rest @ ..], [_, tail @ ..]) => glob(rest, tail),
        ([p, rest @ ..], [t, tail @ ..]) => p == t && glob(rest, tail),
        _ => false,
    }
}

#[test]
fn a_changed_value_is_found_and_can_be_known() {
    let want = [serde_json::json!({"name": "a", "x": [1, {"y": "z"}]})];
    let got = [serde_json::json!({"name": "a", "x": [1, {"y": "q"}]})];
    let score = compare("clusters", &want, &got, &Ignore(vec![]));
    assert_eq!((score.equal, score.all), (0, 1));
    assert!(
        score.differences[0].starts_with("clusters/a/x[1].y"),
        "{}",
        score.differences[0]
    );
    let score = compare(
        "clusters",
        &want,
        &got,
        &Ignore(vec!["clusters/*/x[1].y".into()]),
    );
    assert_eq!((score.equal, score.known), (1, 1));
}
