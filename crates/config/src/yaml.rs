//! YAML and JSON text as JSON values that remember their lines.
//!
//! Users' files reach a cluster through `kubectl`, which reads YAML as Go's library does (YAML 1.1 scalars: `yes` and
//! `on` are booleans, `0644` is octal) and turns it into JSON. The same is done here, so that a folder means what
//! `kubectl apply` of it would mean. Each document is parsed on its own: a broken one does not take its neighbours along.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};

/// One document of a file.
#[derive(Debug, Clone)]
pub struct Document {
    /// Its content.
    pub value: Value,
    /// The line of every node.
    pub lines: Lines,
}

/// The lines (1-based) of a node and of all nodes below it.
#[derive(Debug, Clone, Default)]
pub struct Lines {
    /// Where the node starts: for the value of a mapping, the line of its key.
    pub line: u32,
    children: Children,
}

#[derive(Debug, Clone, Default)]
enum Children {
    #[default]
    None,
    Sequence(Vec<Lines>),
    Mapping(Vec<(String, Lines)>),
}

/// Text that is not YAML.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct YamlError {
    /// 1-based line in the file.
    pub line: u32,
    /// What is wrong there.
    pub message: String,
}

/// Splits a file into its documents and parses each; empty documents are left out.
pub fn documents(text: &str) -> Vec<Result<Document, YamlError>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    split(text)
        .into_iter()
        .filter_map(|(first_line, part)| match document(part, first_line) {
            Ok(None) => None,
            Ok(Some(d)) => Some(Ok(d)),
            Err(e) => Some(Err(e)),
        })
        .collect()
}

/// Parses a text that holds one document (the first, if there are several); `None` when it is empty.
pub fn document(text: &str, first_line: u32) -> Result<Option<Document>, YamlError> {
    let mut builder = Builder {
        first_line,
        ..Builder::default()
    };
    for item in Parser::new_from_str(text) {
        let (event, span) = item.map_err(|e| YamlError {
            line: builder.line(e.marker().line()),
            message: format!("not valid YAML: {e}"),
        })?;
        let line = builder.line(span.start.line());
        if matches!(event, Event::DocumentEnd) {
            break;
        }
        builder.event(event, line)?;
    }
    Ok(builder
        .root
        .filter(|(value, _)| !value.is_null())
        .map(|(value, lines)| Document { value, lines }))
}

impl Lines {
    /// A node without children.
    pub fn at(line: u32) -> Self {
        Lines {
            line,
            children: Children::None,
        }
    }

    /// The line of the node at `path` (as in `http[0].match[1].headers["x"]`), or of its nearest ancestor.
    pub fn find(&self, path: &str) -> u32 {
        let mut node = self;
        for step in steps(path) {
            let next = match (&node.children, &step) {
                (Children::Sequence(items), Step::Index(i)) => items.get(*i),
                (Children::Mapping(items), Step::Key(k)) => {
                    items.iter().find(|(name, _)| name == k).map(|(_, l)| l)
                }
                _ => None,
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        node.line
    }

    /// The lines of a child, if there is one of that name.
    pub fn child(&self, key: &str) -> Option<&Lines> {
        match &self.children {
            Children::Mapping(items) => items.iter().find(|(name, _)| name == key).map(|(_, l)| l),
            _ => None,
        }
    }

    /// The lines of the elements of a sequence.
    pub fn items(&self) -> &[Lines] {
        match &self.children {
            Children::Sequence(items) => items,
            _ => &[],
        }
    }
}

enum Step {
    Index(usize),
    Key(String),
}

/// `a.b[0]["x.y"]` as steps; what does not look like a path ends it.
fn steps(path: &str) -> Vec<Step> {
    let mut out = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(r) = rest.strip_prefix('.') {
            rest = r;
        } else if let Some(r) = rest.strip_prefix("[\"") {
            let Some((key, r)) = r.split_once("\"]") else {
                break;
            };
            out.push(Step::Key(key.to_owned()));
            rest = r;
        } else if let Some(r) = rest.strip_prefix('[') {
            let Some((index, r)) = r.split_once(']') else {
                break;
            };
            let Ok(index) = index.parse() else { break };
            out.push(Step::Index(index));
            rest = r;
        } else {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            out.push(Step::Key(rest[..end].to_owned()));
            rest = &rest[end..];
        }
    }
    out
}

/// `---` at the start of a line always separates documents: YAML allows it nowhere else (9.1.2).
fn split(text: &str) -> Vec<(u32, &str)> {
    let mut out = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (number, line) in (1u32..).zip(text.split_inclusive('\n')) {
        let body = line.trim_end_matches(['\n', '\r']);
        let marker = body
            .strip_prefix("---")
            .is_some_and(|r| r.is_empty() || r.starts_with([' ', '\t']));
        if marker {
            out.push((start_line, &text[start..offset]));
            // What follows the marker on its own line belongs to the new document.
            start = offset + 3;
            start_line = number;
        }
        offset += line.len();
    }
    out.push((start_line, &text[start..]));
    out.retain(|(_, part)| {
        part.lines()
            .any(|l| !l.trim().is_empty() && !l.trim_start().starts_with('#'))
    });
    out
}

#[derive(Default)]
struct Builder {
    first_line: u32,
    stack: Vec<Frame>,
    anchors: HashMap<usize, (Value, Lines)>,
    nodes: usize,
    root: Option<(Value, Lines)>,
}

struct Frame {
    anchor: usize,
    line: u32,
    content: Content,
}

enum Content {
    Sequence(Vec<Value>, Vec<Lines>),
    Mapping {
        values: Map<String, Value>,
        lines: Vec<(String, Lines)>,
        key: Option<(String, u32)>,
        merged: Vec<(Value, Lines)>,
    },
}

impl Builder {
    fn line(&self, in_document: usize) -> u32 {
        self.first_line + u32::try_from(in_document.saturating_sub(1)).unwrap_or(u32::MAX / 2)
    }

    fn event(&mut self, event: Event<'_>, line: u32) -> Result<(), YamlError> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let string_tag = tag.is_some_and(|t| t.to_string().ends_with("str"));
                let is_key = matches!(
                    self.stack.last(),
                    Some(Frame {
                        content: Content::Mapping { key: None, .. },
                        ..
                    })
                );
                let value = if style != ScalarStyle::Plain || string_tag || is_key {
                    Value::String(text.into_owned())
                } else {
                    plain(&text).map_err(|message| YamlError { line, message })?
                };
                self.put(
                    value,
                    Lines {
                        line,
                        children: Children::None,
                    },
                    anchor,
                )
            }
            Event::SequenceStart(_, anchor, _) => {
                self.open(anchor, line, Content::Sequence(Vec::new(), Vec::new()))
            }
            Event::MappingStart(_, anchor, _) => self.open(
                anchor,
                line,
                Content::Mapping {
                    values: Map::new(),
                    lines: Vec::new(),
                    key: None,
                    merged: Vec::new(),
                },
            ),
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(frame) = self.stack.pop() else {
                    return Ok(());
                };
                let (value, children) = match frame.content {
                    Content::Sequence(values, lines) => {
                        (Value::Array(values), Children::Sequence(lines))
                    }
                    Content::Mapping {
                        mut values,
                        mut lines,
                        merged,
                        ..
                    } => {
                        for (value, from) in merged {
                            merge(&mut values, &mut lines, value, &from, line)?;
                        }
                        (Value::Object(values), Children::Mapping(lines))
                    }
                };
                self.put(
                    value,
                    Lines {
                        line: frame.line,
                        children,
                    },
                    frame.anchor,
                )
            }
            Event::Alias(id) => {
                let Some((value, lines)) = self.anchors.get(&id).cloned() else {
                    return Err(YamlError {
                        line,
                        message: "an alias (*name) stands inside its own anchor".into(),
                    });
                };
                self.nodes += count(&value);
                self.limit(line)?;
                self.put(value, lines, 0)
            }
            _ => Ok(()),
        }
    }

    fn open(&mut self, anchor: usize, line: u32, content: Content) -> Result<(), YamlError> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(YamlError {
                line,
                message: format!("nested deeper than {MAX_DEPTH} levels"),
            });
        }
        self.stack.push(Frame {
            anchor,
            line,
            content,
        });
        Ok(())
    }

    fn limit(&self, line: u32) -> Result<(), YamlError> {
        if self.nodes > MAX_NODES {
            let message = format!("aliases expand to more than {MAX_NODES} nodes");
            return Err(YamlError { line, message });
        }
        Ok(())
    }

    fn put(&mut self, value: Value, mut lines: Lines, anchor: usize) -> Result<(), YamlError> {
        self.nodes += 1;
        let line = lines.line;
        if anchor != 0 {
            self.anchors.insert(anchor, (value.clone(), lines.clone()));
        }
        match self.stack.last_mut().map(|f| &mut f.content) {
            None => self.root = Some((value, lines)),
            Some(Content::Sequence(values, all)) => {
                values.push(value);
                all.push(lines);
            }
            Some(Content::Mapping {
                values,
                lines: all,
                key,
                merged,
            }) => match key.take() {
                None => match value {
                    Value::String(name) => *key = Some((name, line)),
                    _ => {
                        let message = "a mapping key must be a plain or quoted scalar".into();
                        return Err(YamlError { line, message });
                    }
                },
                Some((name, _)) if name == "<<" => merged.push((value, lines)),
                Some((name, key_line)) => {
                    lines.line = key_line;
                    if values.contains_key(&name) {
                        let message =
                            format!("the key {name:?} is given twice in one mapping; keep one");
                        return Err(YamlError {
                            line: key_line,
                            message,
                        });
                    }
                    all.push((name.clone(), lines));
                    values.insert(name, value);
                }
            },
        }
        Ok(())
    }
}

/// YAML 1.1's merge key: what the mapping itself says wins.
fn merge(
    values: &mut Map<String, Value>,
    lines: &mut Vec<(String, Lines)>,
    from: Value,
    from_lines: &Lines,
    line: u32,
) -> Result<(), YamlError> {
    match from {
        Value::Object(entries) => {
            for (name, value) in entries {
                if !values.contains_key(&name) {
                    lines.push((
                        name.clone(),
                        from_lines.child(&name).cloned().unwrap_or_default(),
                    ));
                    values.insert(name, value);
                }
            }
            Ok(())
        }
        Value::Array(items) => {
            for (value, from) in items.into_iter().zip(from_lines.items()) {
                merge(values, lines, value, from, line)?;
            }
            Ok(())
        }
        _ => Err(YamlError {
            line,
            message: "\"<<\" merges mappings only".into(),
        }),
    }
}

fn count(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(count).sum::<usize>(),
        Value::Object(entries) => 1 + entries.values().map(count).sum::<usize>(),
        _ => 1,
    }
}

/// A plain scalar as Go's YAML library resolves it.
fn plain(text: &str) -> Result<Value, String> {
    Ok(match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            Value::Bool(true)
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            Value::Bool(false)
        }
        ".nan" | ".NaN" | ".NAN" | ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF"
        | "-.inf" | "-.Inf" | "-.INF" => {
            return Err(format!(
                "{text} has no JSON form; quote it if it is a string"
            ));
        }
        _ => number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number),
    })
}

fn number(text: &str) -> Option<Number> {
    let first = text
        .strip_prefix(['+', '-'])
        .unwrap_or(text)
        .chars()
        .next()?;
    if !first.is_ascii_digit() && first != '.' {
        return None;
    }
    let clean: String = text.chars().filter(|c| *c != '_').collect();
    let (negative, digits) = match clean.strip_prefix('-') {
        Some(d) => (true, d),
        None => (false, clean.strip_prefix('+').unwrap_or(&clean)),
    };
    let (radix, body) = if let Some(d) = digits.strip_prefix("0x") {
        (16, d)
    } else if let Some(d) = digits.strip_prefix("0b") {
        (2, d)
    } else if let Some(d) = digits.strip_prefix("0o") {
        (8, d)
    } else if digits.len() > 1
        && digits.starts_with('0')
        && digits.bytes().all(|b| b.is_ascii_digit())
    {
        (8, &digits[1..])
    } else {
        (10, digits)
    };
    if !body.starts_with(['+', '-'])
        && let Ok(magnitude) = u64::from_str_radix(body, radix)
    {
        return if negative {
            i64::try_from(-i128::from(magnitude)).ok().map(Number::from)
        } else {
            Some(Number::from(magnitude))
        };
    }
    // Only what looks like a float in YAML: `1.2.3`, `10s` and addresses stay strings.
    let shape = digits
        .bytes()
        .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'));
    if !shape || !digits.bytes().any(|b| b.is_ascii_digit()) {
        return None;
    }
    clean.parse::<f64>().ok().and_then(Number::from_f64)
}

/// Far above any real object, far below what would exhaust a stack when the value is dropped.
const MAX_DEPTH: usize = 120;
/// What aliases may expand to.
const MAX_NODES: usize = 1_000_000;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(text: &str) -> Value {
        document(text, 1).unwrap().unwrap().value
    }

    #[test]
    fn scalars_mean_what_kubectl_makes_of_them() {
        assert_eq!(
            one(
                "{a: yes, b: 'yes', c: off, d: 0644, e: 0x10, f: 1_000, g: 1.5, h: 1e3, i: ~, j: 10.0.0.1, k: 10s, l: 1.2.3, m: -4, n: 2024-01-01}"
            ),
            json!({"a": true, "b": "yes", "c": false, "d": 420, "e": 16, "f": 1000, "g": 1.5, "h": 1000.0, "i": null,
                   "j": "10.0.0.1", "k": "10s", "l": "1.2.3", "m": -4, "n": "2024-01-01"})
        );
    }

    #[test]
    fn keys_stay_text_and_block_scalars_stay_strings() {
        assert_eq!(
            one("8080: a\ny: |\n  yes\n"),
            json!({"8080": "a", "y": "yes\n"})
        );
    }

    #[test]
    fn anchors_and_merge_keys() {
        let v = one("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\nc: [*x]\n");
        assert_eq!(v["b"], json!({"p": 1, "q": 3}));
        assert_eq!(v["c"], json!([{"p": 1, "q": 2}]));
    }

    #[test]
    fn a_broken_document_leaves_its_neighbours_and_names_its_line() {
        let docs = documents("a: 1\n---\nb: [1\nc: 2\n---\n# nothing\n---\nd: 4\n");
        assert_eq!(docs.len(), 3);
        assert_eq!(docs[0].as_ref().unwrap().value, json!({"a": 1}));
        let e = docs[1].as_ref().unwrap_err();
        assert!((3..=5).contains(&e.line), "{e:?}");
        let d = docs[2].as_ref().unwrap();
        assert_eq!((d.value.clone(), d.lines.find("d")), (json!({"d": 4}), 8));
    }

    #[test]
    fn lines_follow_field_paths() {
        let d = document(
            "spec:\n  http:\n  - match:\n    - uri:\n        exact: /\n  - route: []\n",
            10,
        )
        .unwrap()
        .unwrap();
        assert_eq!(d.lines.find("spec.http[0].match[0].uri.exact"), 14);
        assert_eq!(d.lines.find("spec.http[1].route[7].nowhere"), 15);
        let d = document("{\"a\": {\"x.y\":\n 1}}", 1).unwrap().unwrap();
        assert_eq!(d.lines.find("a[\"x.y\"]"), 1);
    }

    #[test]
    fn hostile_input_is_an_error_not_a_crash() {
        assert!(document(&"[".repeat(100_000), 1).is_err());
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..10 {
            let refs = vec![format!("*a{}", i - 1); 10].join(",");
            bomb.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
        }
        assert!(document(&bomb, 1).unwrap_err().message.contains("aliases"));
        assert!(
            document("a: 1\na: 2", 1)
                .unwrap_err()
                .message
                .contains("twice")
        );
    }
}
