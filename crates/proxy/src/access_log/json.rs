//! Structured log lines.

use std::io::Write;

use super::{
    Lines,
    format::{self, Presence},
};
use crate::{
    http::Exchange,
    plan::{
        access_log::JsonNode,
        format::{Part, Template},
    },
};

/// Writes a value.
pub(super) fn write(node: &JsonNode, exchange: &Exchange<'_>, omit_empty: bool, out: &mut Vec<u8>) {
    match node {
        JsonNode::Literal(text) => out.extend_from_slice(text.as_bytes()),
        JsonNode::List(items) => {
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write(item, exchange, omit_empty, out);
            }
            out.push(b']');
        }
        JsonNode::Object(members) => {
            out.push(b'{');
            let mut first = true;
            for (name, value) in members {
                let start = out.len();
                if !first {
                    out.push(b',');
                }
                string(name.as_bytes(), out);
                out.push(b':');
                let at = out.len();
                write(value, exchange, omit_empty, out);
                if omit_empty && &out[at..] == b"null" {
                    out.truncate(start);
                } else {
                    first = false;
                }
            }
            out.push(b'}');
        }
        JsonNode::Template(template) => self::template(template, exchange, omit_empty, out),
    }
}

/// A text with operators. One operator alone keeps its type.
fn template(template: &Template, exchange: &Exchange<'_>, omit_empty: bool, out: &mut Vec<u8>) {
    if let [Part::Operator(operator)] = &*template.parts {
        let mut value = Vec::new();
        return match format::operator(operator, exchange, None, &mut value) {
            Presence::Absent => out.extend_from_slice(b"null"),
            Presence::Text => string(&value, out),
            Presence::Json => out.extend_from_slice(&value),
        };
    }
    let mut text = Vec::new();
    // Line ends are escaped below.
    format::text(template, exchange, omit_empty, Lines::Any, &mut text);
    string(&text, out);
}

/// A JSON string; bytes that are not UTF-8 become the replacement character.
fn string(text: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    for character in String::from_utf8_lossy(text).chars() {
        match character {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            control if control < ' ' || control == '\u{7f}' => {
                let _ = write!(out, "\\u{:04x}", control as u32);
            }
            plain => {
                let _ = write!(out, "{plain}");
            }
        }
    }
    out.push(b'"');
}
