//! Packs a descriptor set into the tables that `src/schema.rs` reads in place.
//!
//! Little-endian 32-bit words: a head of [`HEAD`] words, then messages (sorted by full name), fields (by number within
//! their message), enums, their values, oneofs, and one text that all names are slices of. Positions are relative, so
//! nothing is relocated, decoded or kept on the heap at run time: a page that nobody reads is never in memory.

use std::collections::HashMap;

use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

/// Where messages, fields, enums, values, oneofs and text begin, and how many messages there are.
const HEAD: usize = 7;
/// Flags of a field, above its type.
const LIST: u32 = 1 << 8;
const MAP: u32 = 1 << 9;
const PRESENCE: u32 = 1 << 10;
const PACKED: u32 = 1 << 11;
/// "Of no oneof".
const NONE: u32 = u32::MAX;

/// The tables as bytes.
pub(crate) fn pack(set: &FileDescriptorSet) -> Vec<u8> {
    let mut all = All::default();
    for file in &set.file {
        let proto3 = file.syntax() == "proto3";
        for message in &file.message_type {
            all.message(file.package(), message, proto3);
        }
        for declared in &file.enum_type {
            all.enums
                .push((full(file.package(), declared.name()), declared));
        }
    }
    all.messages.sort_by(|a, b| a.0.cmp(&b.0));
    all.enums.sort_by(|a, b| a.0.cmp(&b.0));
    all.tables()
}

#[derive(Default)]
struct All<'a> {
    messages: Vec<(String, &'a DescriptorProto, bool)>,
    enums: Vec<(String, &'a EnumDescriptorProto)>,
}

impl<'a> All<'a> {
    fn message(&mut self, scope: &str, message: &'a DescriptorProto, proto3: bool) {
        let name = full(scope, message.name());
        for inner in &message.nested_type {
            self.message(&name, inner, proto3);
        }
        for inner in &message.enum_type {
            self.enums.push((full(&name, inner.name()), inner));
        }
        self.messages.push((name, message, proto3));
    }

    fn tables(&self) -> Vec<u8> {
        let message_index: HashMap<&str, usize> = self
            .messages
            .iter()
            .enumerate()
            .map(|(i, m)| (m.0.as_str(), i))
            .collect();
        let enum_index: HashMap<&str, usize> = self
            .enums
            .iter()
            .enumerate()
            .map(|(i, e)| (e.0.as_str(), i))
            .collect();
        let mut text = Text::default();
        let (mut messages, mut fields, mut oneofs) = (Vec::new(), Vec::new(), Vec::new());
        for (name, message, proto3) in &self.messages {
            let mut own: Vec<&FieldDescriptorProto> = message.field.iter().collect();
            own.sort_by_key(|f| f.number());
            assert!(
                own.len() <= 256,
                "{name} has more fields than the reader's set of seen ones holds"
            );
            text.put(name, &mut messages);
            messages.extend([
                (fields.len() / 8) as u32,
                own.len() as u32,
                (oneofs.len() / 2) as u32,
            ]);
            for field in own {
                text.put(field.name(), &mut fields);
                text.put(&json_name(field), &mut fields);
                let kind = field.r#type();
                let type_name = field.type_name().trim_start_matches('.');
                let list = field.label() == Label::Repeated;
                let mut shape = kind as u32;
                let target = match kind {
                    Type::Message | Type::Group => {
                        let index = message_index[type_name];
                        let entry = self.messages[index]
                            .1
                            .options
                            .as_ref()
                            .is_some_and(|o| o.map_entry());
                        if list && entry {
                            shape |= MAP;
                        }
                        index
                    }
                    Type::Enum => enum_index[type_name],
                    _ => 0,
                };
                if list && shape & MAP == 0 {
                    shape |= LIST;
                    let number = !matches!(
                        kind,
                        Type::String | Type::Bytes | Type::Message | Type::Group
                    );
                    if number
                        && field
                            .options
                            .as_ref()
                            .and_then(|o| o.packed)
                            .unwrap_or(*proto3)
                    {
                        shape |= PACKED;
                    }
                }
                let oneof = field.oneof_index.filter(|_| !field.proto3_optional());
                let message_kind = matches!(kind, Type::Message | Type::Group);
                if !list && (message_kind || field.oneof_index.is_some() || !proto3) {
                    shape |= PRESENCE;
                }
                let oneof = oneof.map_or(NONE, |index| index as u32);
                fields.extend([field.number() as u32, shape, target as u32, oneof]);
            }
            for oneof in &message.oneof_decl {
                text.put(oneof.name(), &mut oneofs);
            }
        }
        let (mut enums, mut values) = (Vec::new(), Vec::new());
        for (name, declared) in &self.enums {
            text.put(name, &mut enums);
            enums.extend([(values.len() / 3) as u32, declared.value.len() as u32]);
            for value in &declared.value {
                text.put(value.name(), &mut values);
                values.push(value.number() as u32);
            }
        }
        let mut words = vec![self.messages.len() as u32];
        let mut at = HEAD;
        for part in [&messages, &fields, &enums, &values, &oneofs] {
            words.push((at * 4) as u32);
            at += part.len();
        }
        words.push((at * 4) as u32);
        for part in [messages, fields, enums, values, oneofs] {
            words.extend(part);
        }
        let mut out: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        out.extend(text.bytes);
        out
    }
}

/// Names one after the other, each once.
#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    known: HashMap<String, u32>,
}

impl Text {
    /// Appends position and length of a name.
    fn put(&mut self, name: &str, words: &mut Vec<u32>) {
        let at = *self.known.entry(name.to_owned()).or_insert_with(|| {
            let at = self.bytes.len() as u32;
            self.bytes.extend(name.as_bytes());
            at
        });
        words.extend([at, name.len() as u32]);
    }
}

/// As declared, else as protoc makes it of the name (committed sets leave it out where it is that).
fn json_name(field: &FieldDescriptorProto) -> String {
    if let Some(name) = &field.json_name {
        return name.clone();
    }
    let mut out = String::new();
    let mut upper = false;
    for c in field.name().chars() {
        match c {
            '_' => upper = true,
            c if std::mem::take(&mut upper) => out.push(c.to_ascii_uppercase()),
            c => out.push(c),
        }
    }
    out
}

fn full(scope: &str, name: &str) -> String {
    if scope.is_empty() {
        name.to_owned()
    } else {
        format!("{scope}.{name}")
    }
}
