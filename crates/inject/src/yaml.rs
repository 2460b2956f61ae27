//! YAML text that every reader understands alike: what YAML 1.1 would take for a number or a truth value is quoted.

use serde_json::Value;

/// The value as YAML, in the layout of `kubectl get -o yaml`: keys sorted, lists not indented.
pub fn print(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(o) if !o.is_empty() => block(value, 0, &mut out),
        Value::Array(a) if !a.is_empty() => block(value, 0, &mut out),
        _ => {
            scalar(value, 0, &mut out);
            out.push('\n');
        }
    }
    out
}

fn block(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                pad(indent, out);
                text(key, indent, out);
                out.push(':');
                match value {
                    Value::Object(o) if !o.is_empty() => {
                        out.push('\n');
                        block(value, indent + 2, out);
                    }
                    Value::Array(a) if !a.is_empty() => {
                        out.push('\n');
                        block(value, indent, out);
                    }
                    _ => {
                        out.push(' ');
                        scalar(value, indent + 2, out);
                        out.push('\n');
                    }
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                pad(indent, out);
                out.push_str("- ");
                match item {
                    Value::Object(o) if !o.is_empty() => inline(item, indent, out),
                    Value::Array(a) if !a.is_empty() => inline(item, indent, out),
                    _ => {
                        scalar(item, indent + 2, out);
                        out.push('\n');
                    }
                }
            }
        }
        _ => {}
    }
}

/// A block whose first line goes behind the dash.
fn inline(item: &Value, indent: usize, out: &mut String) {
    let mut nested = String::new();
    block(item, indent + 2, &mut nested);
    out.push_str(nested.trim_start_matches(' '));
}

fn pad(indent: usize, out: &mut String) {
    out.extend(std::iter::repeat_n(' ', indent));
}

fn scalar(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::String(s) => text(s, indent, out),
        Value::Object(_) => out.push_str("{}"),
        Value::Array(_) => out.push_str("[]"),
        other => out.push_str(&other.to_string()),
    }
}

fn text(s: &str, indent: usize, out: &mut String) {
    if plain(s) {
        out.push_str(s);
        return;
    }
    let printable = |c: char| c == '\n' || !c.is_control() && c != '\u{feff}';
    let literal = s.contains('\n')
        && s.chars().all(printable)
        && !s.starts_with([' ', '\n'])
        && indent > 0
        && s.lines().all(|l| !l.ends_with(' '));
    if !literal {
        // Single quotes where nothing must be escaped and the text could not be anything else: JSON stays readable.
        if s.chars().any(|c| c.is_control() || !c.is_ascii()) || other_type(s) {
            out.push_str(&Value::from(s).to_string());
        } else {
            out.push_str(&format!("'{}'", s.replace('\'', "''")));
        }
        return;
    }
    let body = s.trim_end_matches('\n');
    out.push_str(match s.len() - body.len() {
        0 => "|-",
        1 => "|",
        _ => "|+",
    });
    for line in s.strip_suffix('\n').unwrap_or(s).split('\n') {
        out.push('\n');
        if !line.is_empty() {
            pad(indent, out);
            out.push_str(line);
        }
    }
}

/// Whether a text can stand without quotes.
fn plain(s: &str) -> bool {
    let Some(first) = s.chars().next() else {
        return false;
    };
    let begins = first.is_ascii_alphanumeric() || "/_.$(-+".contains(first);
    let characters = s.chars().all(|c| c.is_ascii_graphic() || c == ' ');
    if !begins || !characters || s.contains(": ") || s.contains(" #") || s.ends_with([':', ' ']) {
        return false;
    }
    if s == "-" || s.starts_with("- ") || s.starts_with("---") || s.starts_with("...") {
        return false;
    }
    !other_type(s)
}

/// Whether YAML 1.1 reads a plain text as a number, a truth value, a date or nothing; on the safe side.
fn other_type(s: &str) -> bool {
    let lower = s.to_ascii_lowercase();
    let words = [
        "y", "n", "yes", "no", "on", "off", "true", "false", "null", "~", "", ".inf", ".nan",
    ];
    let unsigned = lower.strip_prefix(['-', '+']).unwrap_or(&lower);
    let numeric = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && unsigned
            .chars()
            .all(|c| "0123456789abcdefxo_.:+-tz ".contains(c));
    numeric || words.contains(&lower.as_str()) || words.contains(&unsigned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_printed_reads_back_the_same() {
        let value = json!({
            "texts": ["", "*", "a: b", "15020", "1e3", "0x1f", "1.5", "12:30", "2026-01-01", "yes", "Off", "null", "~", "-", "- a",
                "--domain", "-p", "a #b", "#", "&x", "{}", "tab\tx", " lead", "é", "x:", "0o17", ".5", "+1", "on", "1_000", "a\"b", "'q'", "1Gi", ".inf"],
            "lines": "one\n  two\n\nthree", "end": "x\n", "ends": "x\n\n", "odd": "\nx", "spaced": "a \nb",
            "empty": {"o": {}, "l": [], "n": null, "b": true, "i": 3},
            "nested": [[1, ["two"]], {"a": [{"b": "c\nd\n"}]}],
        });
        let text = print(&value);
        let back = config::yaml::document(&text, 1).unwrap().unwrap().value;
        assert_eq!(back, value, "{text}");
        assert_eq!(
            print(&json!({"a": ["--who", {"b": 1}]})),
            "a:\n- --who\n- b: 1\n"
        );
        assert_eq!(print(&json!({})), "{}\n");
    }
}
