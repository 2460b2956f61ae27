//! Tests in protobuf's text format (`.pb_text`), turned into the JSON form of the same document.

use anyhow::{Context, bail};
use serde_json::{Map, Value};

/// Reads a `Validation`.
pub(super) fn read(text: &str) -> anyhow::Result<Value> {
    let mut reader = Reader {
        text,
        rest: text,
        depth: 0,
    };
    let document = reader
        .message("", None)
        .and_then(|map| match reader.rest.is_empty() {
            true => Ok(map),
            false => bail!("`{}` closes nothing", &reader.rest[..1]),
        })
        .with_context(|| format!("line {}", reader.line()))?;
    Ok(Value::Object(document))
}

/// How a field is written in JSON.
enum Shape {
    One,
    List,
    /// One of protobuf's wrappers, and what an empty one holds.
    Wrapper(Value),
    Duration,
    Struct,
}

impl Shape {
    /// Of a field of the message that stands in the field `parent`.
    fn of(parent: &str, field: &str) -> Self {
        match (parent, field) {
            ("", "tests")
            | (
                "input",
                "additional_request_headers" | "additional_response_headers" | "dynamic_metadata",
            )
            | (
                "validate",
                "request_header_matches"
                | "response_header_matches"
                | "request_header_fields"
                | "response_header_fields"
                | "route_metadata",
            )
            | (STRUCT | "struct_value", "fields")
            | ("list_value", "values") => Self::List,
            (
                "validate",
                "cluster_name"
                | "virtual_cluster_name"
                | "virtual_host_name"
                | "host_rewrite"
                | "path_rewrite"
                | "path_redirect",
            ) => Self::Wrapper("".into()),
            ("validate", "code_redirect") => Self::Wrapper(0.into()),
            ("validate", "timeout") => Self::Duration,
            ("dynamic_metadata", "value") => Self::Struct,
            _ => Self::One,
        }
    }
}

struct Reader<'t> {
    text: &'t str,
    /// What is not read yet.
    rest: &'t str,
    depth: usize,
}

impl<'t> Reader<'t> {
    /// The fields of the message in the field `parent`, up to `end` or the end of the text.
    fn message(&mut self, parent: &str, end: Option<char>) -> anyhow::Result<Map<String, Value>> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            bail!("messages in more than {MAX_DEPTH} messages");
        }
        let mut fields = Map::new();
        loop {
            self.skip();
            match (self.rest.chars().next(), end) {
                (None, None) => break,
                (None, Some(end)) => bail!("the text ends before `{end}`"),
                (Some(c), Some(end)) if c == end => {
                    self.take(c);
                    break;
                }
                (Some('}' | '>'), None) => break,
                _ => self.field(parent, &mut fields)?,
            }
            self.skip();
            let _ = self.take(',') || self.take(';');
        }
        self.depth -= 1;
        Ok(fields)
    }

    fn field(&mut self, parent: &str, fields: &mut Map<String, Value>) -> anyhow::Result<()> {
        let name = self.word();
        if name.is_empty() {
            let found: String = self.rest.chars().take(10).collect();
            bail!("`{found}` is no field's name");
        }
        self.skip();
        let colon = self.take(':');
        self.skip();
        let shape = Shape::of(parent, name);
        if self.take('[') {
            let Shape::List = shape else {
                bail!("{name}: is no list");
            };
            loop {
                self.skip();
                if self.take(']') {
                    return Ok(());
                }
                let value = self.value(name, true)?;
                push(fields, name, value)?;
                self.skip();
                let _ = self.take(',');
            }
        }
        let inside = match shape {
            Shape::Struct => STRUCT,
            _ => name,
        };
        let value = self.value(inside, colon)?;
        match shape {
            Shape::List => return push(fields, name, value),
            _ if fields.contains_key(name) => bail!("{name}: is given twice"),
            Shape::One => fields.insert(name.to_owned(), value),
            Shape::Wrapper(default) => {
                let value = value.get("value").cloned().unwrap_or(default);
                fields.insert(name.to_owned(), value)
            }
            Shape::Duration => {
                let part = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or_default();
                let text = format!("{}.{:09}s", part("seconds"), part("nanos"));
                fields.insert(name.to_owned(), text.into())
            }
            Shape::Struct => fields.insert(name.to_owned(), of_struct(&value)),
        };
        Ok(())
    }

    /// A scalar, which stands behind a colon, or a message.
    fn value(&mut self, name: &str, colon: bool) -> anyhow::Result<Value> {
        for (open, close) in [('{', '}'), ('<', '>')] {
            if self.take(open) {
                return self.message(name, Some(close)).map(Value::Object);
            }
        }
        if !colon {
            bail!("{name}: needs a `:` or a `{{`");
        }
        if self.rest.starts_with(['"', '\'']) {
            let mut bytes = Vec::new();
            while let Some(quote) = self.rest.chars().next().filter(|c| matches!(c, '"' | '\'')) {
                self.take(quote);
                self.quoted(quote, &mut bytes)
                    .with_context(|| name.to_owned())?;
                // Neighbours are one text.
                self.skip();
            }
            let text = String::from_utf8(bytes).with_context(|| name.to_owned())?;
            return Ok(text.into());
        }
        let word = self.word();
        scalar(word).with_context(|| format!("{name}: `{word}` is no value"))
    }

    /// The rest of a text whose opening quote was taken.
    fn quoted(&mut self, quote: char, bytes: &mut Vec<u8>) -> anyhow::Result<()> {
        loop {
            let Some(c) = self.rest.chars().next().filter(|c| *c != '\n') else {
                bail!("the text is not closed");
            };
            self.rest = &self.rest[c.len_utf8()..];
            match c {
                c if c == quote => return Ok(()),
                '\\' => self.escape(bytes)?,
                c => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
    }

    fn escape(&mut self, bytes: &mut Vec<u8>) -> anyhow::Result<()> {
        let Some(c) = self.rest.chars().next() else {
            bail!("the text is not closed");
        };
        let (radix, from, most) = match c {
            '0'..='7' => (8, 0, 3),
            'x' | 'X' => (16, 1, 2),
            'u' => (16, 1, 4),
            'U' => (16, 1, 8),
            c => {
                self.rest = &self.rest[c.len_utf8()..];
                bytes.push(match c {
                    'a' => 7,
                    'b' => 8,
                    't' => b'\t',
                    'n' => b'\n',
                    'v' => 11,
                    'f' => 12,
                    'r' => b'\r',
                    '\\' | '\'' | '"' | '?' => c as u8,
                    _ => bail!("`\\{c}` is no escape"),
                });
                return Ok(());
            }
        };
        let digits = &self.rest[from..];
        let length = digits
            .chars()
            .take(most)
            .take_while(|c| c.is_digit(radix))
            .count();
        let number = u32::from_str_radix(&digits[..length], radix);
        let number = number.with_context(|| format!("`\\{c}` needs digits"))?;
        self.rest = &digits[length..];
        if matches!(c, 'u' | 'U') {
            let c = char::from_u32(number).context("is no character")?;
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        } else {
            bytes.push(u8::try_from(number).context("is no byte")?);
        }
        Ok(())
    }

    /// A name, a number or the like.
    fn word(&mut self) -> &'t str {
        let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '+');
        let end = self.rest.find(|c| !inside(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn take(&mut self, c: char) -> bool {
        let rest = self.rest.strip_prefix(c);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Past spaces and comments.
    fn skip(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            if !self.rest.starts_with('#') {
                return;
            }
            let end = self.rest.find('\n').unwrap_or(self.rest.len());
            self.rest = &self.rest[end..];
        }
    }

    fn line(&self) -> usize {
        let read = self.text.len() - self.rest.len();
        1 + self.text[..read].matches('\n').count()
    }
}

fn push(fields: &mut Map<String, Value>, name: &str, value: Value) -> anyhow::Result<()> {
    let list = fields.entry(name).or_insert_with(|| Value::Array(vec![]));
    list.as_array_mut()
        .with_context(|| format!("{name}: is no list"))?
        .push(value);
    Ok(())
}

fn scalar(word: &str) -> Option<Value> {
    let plain = word.strip_prefix('-').unwrap_or(word);
    if !plain.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return match word {
            "" => None,
            "true" | "True" => Some(true.into()),
            "false" | "False" => Some(false.into()),
            // A value of an enum.
            name => Some(name.into()),
        };
    }
    let hexadecimal = plain
        .strip_prefix("0x")
        .or_else(|| plain.strip_prefix("0X"));
    let octal = plain.strip_prefix('0').filter(|rest| !rest.is_empty());
    let number = match (hexadecimal, octal) {
        (Some(digits), _) => i128::from_str_radix(digits, 16).ok(),
        (None, Some(digits)) => i128::from_str_radix(digits, 8).ok(),
        (None, None) => plain.parse().ok(),
    };
    let Some(number) = number else {
        let number: f64 = word.trim_end_matches(['f', 'F']).parse().ok()?;
        return serde_json::Number::from_f64(number).map(Value::Number);
    };
    match word.starts_with('-') {
        true => i64::try_from(-number).ok().map(Value::from),
        false => u64::try_from(number).ok().map(Value::from),
    }
}

/// A `google.protobuf.Struct`.
fn of_struct(message: &Value) -> Value {
    let fields = message.get("fields").and_then(Value::as_array);
    let entry = |entry: &Value| {
        let key = entry.get("key").and_then(Value::as_str).unwrap_or_default();
        let value = entry.get("value").map_or(Value::Null, of_value);
        (key.to_owned(), value)
    };
    Value::Object(fields.into_iter().flatten().map(entry).collect())
}

/// A `google.protobuf.Value`.
fn of_value(message: &Value) -> Value {
    let kind = message.as_object().and_then(|fields| fields.iter().next());
    match kind {
        None => Value::Null,
        Some((kind, value)) => match kind.as_str() {
            "null_value" => Value::Null,
            "struct_value" => of_struct(value),
            "list_value" => {
                let values = value.get("values").and_then(Value::as_array);
                values.into_iter().flatten().map(of_value).collect()
            }
            _ => value.clone(),
        },
    }
}

/// What the message of dynamic metadata counts as; no field has this name.
const STRUCT: &str = "google.protobuf.Struct";

/// As deep as protobuf's own readers go.
const MAX_DEPTH: usize = 100;
