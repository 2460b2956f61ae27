//! JSON and YAML → the wire, strictly, with the path of whatever is wrong.
//!
//! The text is read once and the encoded message written beside it: there is no tree in between, however large the
//! configuration is. The one thing kept back is an `Any` whose `@type` does not come first.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{
    JsonError,
    path::{Path, Segment},
    scalar::{Scalar, expected},
    well_known,
};
use crate::{
    any::type_name,
    schema::{FieldDescriptor, Kind, MessageDescriptor},
    wire::{close, open, write_bytes},
};

/// How much is taken beside the canonical form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Dialect {
    /// Nothing.
    Canonical,
    /// What Envoy's reader takes (protobuf's own for C++, by its old ways): names of enums in any case, quoted booleans, one
    /// value in place of a list of one.
    Envoy,
    /// That, and `true` and `7` for a text: the values were written without the message's type in view.
    Untyped,
}

/// Reads one message; `from` may be text or a value.
pub(super) fn read<'de, D: Deserializer<'de>>(
    descriptor: MessageDescriptor,
    from: D,
    dialect: Dialect,
) -> Result<Vec<u8>, JsonError> {
    let mut reader = Reader {
        out: Vec::new(),
        dialect,
        path: Path::default(),
        error: None,
    };
    let seed = Seed {
        reader: &mut reader,
        what: What::Content(descriptor),
    };
    match seed.deserialize(from) {
        Ok(_) => Ok(reader.out),
        // What the reader finds wrong has a path; the rest is no JSON or YAML.
        Err(other) => Err(reader
            .error
            .unwrap_or_else(|| JsonError::Syntax(other.to_string()))),
    }
}

/// The encoded message so far.
pub(super) struct Reader {
    pub(super) out: Vec<u8>,
    pub(super) dialect: Dialect,
    path: Path,
    pub(super) error: Option<JsonError>,
}

impl Reader {
    /// What is wrong where the reader stands.
    pub(super) fn fail<E: Error>(&mut self, message: impl Into<String>) -> E {
        // The first one counts; what follows only passes it on.
        let path = &self.path;
        self.error.get_or_insert_with(|| path.error(message));
        E::custom("")
    }

    fn within<T, E: Error>(
        &mut self,
        segment: Segment,
        read: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<T, E> {
        if !self.path.push(segment) {
            return Err(self.fail(Path::TOO_DEEP));
        }
        let out = read(self)?;
        self.path.pop();
        Ok(out)
    }

    /// Fields of a message: `first`, then the rest of the object.
    fn fill<'de, A: MapAccess<'de>>(
        &mut self,
        descriptor: MessageDescriptor,
        map: &mut A,
        mut first: Option<Key>,
    ) -> Result<(), A::Error> {
        let mut seen = Seen::default();
        loop {
            let key = match first.take() {
                Some(key) => key,
                None => match map.next_key_seed(KeySeed(descriptor))? {
                    Some(key) => key,
                    None => return Ok(()),
                },
            };
            let (field, name) = match key {
                Key::Field(field, name) => (field, name),
                Key::Other(name) => {
                    let message = unknown_field(descriptor, &name);
                    return self.within(Segment::Key(name, false), |r| Err(r.fail(message)));
                }
            };
            self.within(Segment::Name(name), |reader| {
                let what = What::Field(field, seen.clash(descriptor, field));
                if map.next_value_seed(Seed { reader, what })? {
                    seen.mark(field);
                }
                Ok(())
            })?;
        }
    }

    /// `{"@type": …}` with the type in front or anywhere.
    fn any<'de, A: MapAccess<'de>>(&mut self, mut map: A) -> Result<(), A::Error> {
        match map.next_key::<String>()? {
            None => Ok(()),
            Some(key) if key == "@type" => {
                let url = map.next_value::<Value>()?;
                let descriptor = self.any_type(&url)?;
                self.any_content(&url, descriptor, &mut map)
            }
            Some(key) => {
                let mut rest = Map::new();
                rest.insert(key, map.next_value()?);
                while let Some((key, value)) = map.next_entry()? {
                    rest.insert(key, value);
                }
                let url = rest.remove("@type").unwrap_or_default();
                let descriptor = self.any_type(&url)?;
                let mut rest = serde::de::value::MapDeserializer::new(
                    rest.iter().map(|(key, value)| (key.as_str(), value)),
                );
                let read: Result<(), serde_json::Error> =
                    self.any_content(&url, descriptor, &mut rest);
                read.map_err(|e| self.fail(e.to_string()))
            }
        }
    }

    fn any_type<E: Error>(&mut self, url: &Value) -> Result<MessageDescriptor, E> {
        let Value::String(url) = url else {
            return Err(
                self.fail("\"@type\" is missing: name the type, e.g. type.googleapis.com/envoy.…")
            );
        };
        match MessageDescriptor::find(type_name(url)) {
            Some(descriptor) => Ok(descriptor),
            None => self.within(Segment::Name("@type"), |r| {
                Err(r.fail(format!("unknown type {url:?}")))
            }),
        }
    }

    fn any_content<'de, A: MapAccess<'de>>(
        &mut self,
        url: &Value,
        descriptor: MessageDescriptor,
        map: &mut A,
    ) -> Result<(), A::Error> {
        write_bytes(
            &mut self.out,
            1,
            url.as_str().unwrap_or_default().as_bytes(),
        );
        let begin = open(&mut self.out, 2);
        if well_known::is_well_known(descriptor.full_name()) {
            while let Some(key) = map.next_key::<String>()? {
                if key != "value" {
                    let message =
                        format!("unknown field in {}; it has value", descriptor.full_name());
                    return self.within(Segment::Key(key, false), |r| Err(r.fail(message)));
                }
                self.within(Segment::Name("value"), |reader| {
                    map.next_value_seed(Seed {
                        reader,
                        what: What::Content(descriptor),
                    })
                })?;
            }
        } else {
            self.fill(descriptor, map, None)?;
        }
        close(&mut self.out, begin);
        Ok(())
    }
}

/// Which fields of a message were given.
#[derive(Default)]
struct Seen([u64; 4]);

impl Seen {
    fn has(&self, field: FieldDescriptor) -> bool {
        let place = usize::from(field.place());
        self.0[place / 64] & (1 << (place % 64)) != 0
    }

    fn mark(&mut self, field: FieldDescriptor) {
        let place = usize::from(field.place());
        self.0[place / 64] |= 1 << (place % 64);
    }

    /// What a value of this field would be in conflict with.
    fn clash(&self, descriptor: MessageDescriptor, field: FieldDescriptor) -> Clash {
        if self.has(field) {
            return Clash::Twice;
        }
        let Some((oneof, name)) = field.containing_oneof() else {
            return Clash::None;
        };
        let same = |f: &FieldDescriptor| f.containing_oneof().is_some_and(|(o, _)| o == oneof);
        match descriptor.fields().find(|f| self.has(*f) && same(f)) {
            Some(other) => Clash::Oneof(name, other.json_name()),
            None => Clash::None,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Clash {
    None,
    Twice,
    Oneof(&'static str, &'static str),
}

impl Clash {
    fn message(self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Twice => Some("the same field is given twice (once in each spelling)".into()),
            Self::Oneof(oneof, other) => {
                Some(format!("only one of {oneof} may be set, and {other} is"))
            }
        }
    }
}

enum Key {
    /// With the spelling that was used.
    Field(FieldDescriptor, &'static str),
    Other(String),
}

struct KeySeed(MessageDescriptor);

impl<'de> DeserializeSeed<'de> for KeySeed {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Key, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the name of a field of {}", self.0.full_name())
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Key, E> {
        let json = self
            .0
            .get_field_by_json_name(name)
            .map(|f| Key::Field(f, f.json_name()));
        let own = || {
            self.0
                .get_field_by_name(name)
                .map(|f| Key::Field(f, f.name()))
        };
        Ok(json
            .or_else(own)
            .unwrap_or_else(|| Key::Other(name.to_owned())))
    }
}

/// What the next value is.
#[derive(Clone, Copy)]
pub(super) enum What {
    /// The fields of a message, without a tag in front.
    Content(MessageDescriptor),
    /// The value of a field, the whole list or map.
    Field(FieldDescriptor, Clash),
    /// One element of a list, or the value of a map's entry.
    Element(FieldDescriptor),
    /// One number of a packed list, without a tag.
    Packed(Kind),
}

/// Reads a value; says whether it was more than null.
struct Seed<'r> {
    reader: &'r mut Reader,
    what: What,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<bool, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E: Error>(self, v: bool) -> Result<bool, E> {
        self.scalar(Scalar::Bool(v))
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<bool, E> {
        self.scalar(Scalar::Integer(v.into()))
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<bool, E> {
        self.scalar(Scalar::Integer(v.into()))
    }

    fn visit_f64<E: Error>(self, v: f64) -> Result<bool, E> {
        self.scalar(Scalar::Float(v))
    }

    fn visit_str<E: Error>(self, v: &str) -> Result<bool, E> {
        self.scalar(Scalar::Text(v))
    }

    fn visit_unit<E: Error>(self) -> Result<bool, E> {
        self.scalar(Scalar::Null)
    }

    fn visit_none<E: Error>(self) -> Result<bool, E> {
        self.scalar(Scalar::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<bool, D::Error> {
        self.deserialize(from)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<bool, A::Error> {
        let Self { reader, what } = self;
        match what {
            What::Field(field, clash) if field.is_list() => {
                if let Some(message) = clash.message() {
                    return Err(reader.fail(message));
                }
                let packed = field
                    .is_packed()
                    .then(|| open(&mut reader.out, field.number()));
                let what = match packed {
                    Some(_) => What::Packed(field.kind()),
                    None => What::Element(field),
                };
                let mut index = 0;
                // The reader says where it is in case that the element is wrong.
                while reader.within(Segment::Index(index), |reader| {
                    list.next_element_seed(Seed { reader, what })
                        .map(|e| e.is_some())
                })? {
                    index += 1;
                }
                if let Some(begin) = packed {
                    match index {
                        // An empty list is not on the wire.
                        0 => reader.out.truncate(begin - tag_and_length(field)),
                        _ => close(&mut reader.out, begin),
                    }
                }
                Ok(true)
            }
            _ => {
                let begin = reader.begin(what);
                match reader.free_kind(what) {
                    Some("google.protobuf.ListValue") => reader.list_value(&mut list)?,
                    Some("google.protobuf.Value") => {
                        let inner = open(&mut reader.out, 6);
                        reader.list_value(&mut list)?;
                        close(&mut reader.out, inner);
                    }
                    _ => return Err(reader.wrong(what, "a list")),
                }
                reader.end(begin);
                Ok(true)
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let Self { reader, mut what } = self;
        if let What::Field(field, clash) = what {
            if let Some(message) = clash.message() {
                return Err(reader.fail(message));
            }
            if field.is_map() {
                return reader.map(field, map);
            }
            if reader.takes_one(field) {
                what = What::Element(field);
            }
        }
        let (What::Content(_) | What::Field(..) | What::Element(_)) = what else {
            return Err(reader.wrong(what, "an object"));
        };
        let descriptor = match what {
            What::Field(field, _) if field.is_list() => None,
            What::Field(field, _) | What::Element(field) => field.kind().as_message().copied(),
            What::Content(descriptor) => Some(descriptor),
            What::Packed(_) => None,
        };
        let Some(descriptor) = descriptor else {
            return Err(reader.wrong(what, "an object"));
        };
        let begin = reader.begin(what);
        match descriptor.full_name() {
            "google.protobuf.Any" => reader.any(map)?,
            "google.protobuf.Struct" => reader.object_value(&mut map)?,
            "google.protobuf.Value" => {
                let inner = open(&mut reader.out, 5);
                reader.object_value(&mut map)?;
                close(&mut reader.out, inner);
            }
            "google.protobuf.ListValue" | "google.protobuf.FieldMask" => {
                return Err(reader.wrong(what, "an object"));
            }
            // Not canonical for those that are a scalar in JSON, but configurations of Envoy have
            // `timeout: {seconds: 30}`, which its own reader takes.
            _ => reader.fill(descriptor, &mut map, None)?,
        }
        reader.end(begin);
        Ok(true)
    }
}

impl Seed<'_> {
    fn scalar<E: Error>(self, value: Scalar<'_>) -> Result<bool, E> {
        let Self { reader, mut what } = self;
        let (kind, field) = match what {
            What::Content(descriptor) => (Kind::Message(descriptor), None),
            What::Packed(kind) => (kind, None),
            What::Field(field, _) | What::Element(field) => (field.kind(), Some(field)),
        };
        if let (What::Field(field, clash), value) = (what, value) {
            let takes_null = reader.free_kind(what) == Some("google.protobuf.Value");
            // `null` is "not set", except for the type whose value it is.
            if matches!(value, Scalar::Null) && !takes_null {
                return Ok(false);
            }
            if let Some(message) = clash.message() {
                return Err(reader.fail(message));
            }
            if reader.takes_one(field) {
                what = What::Element(field);
            } else if field.is_map() || field.is_list() {
                return Err(reader.wrong(what, &value.to_string()));
            }
        }
        if let Kind::Message(descriptor) = kind {
            let begin = reader.begin(what);
            reader.well_known(descriptor, value)?;
            reader.end(begin);
            return Ok(true);
        }
        let number = field.map(|f| f.number());
        // Only a field that cannot tell "not set" from the default leaves the default out.
        let keep = match what {
            What::Field(field, _) => field.has_presence(),
            _ => true,
        };
        reader.put(kind, number, keep, value)?;
        Ok(true)
    }
}

impl Reader {
    /// Whether a value that is no list stands for a list of one here.
    fn takes_one(&self, field: FieldDescriptor) -> bool {
        self.dialect >= Dialect::Envoy && field.is_list()
    }

    /// The tag of a message's value, where it has one.
    fn begin(&mut self, what: What) -> Option<usize> {
        match what {
            What::Field(field, _) | What::Element(field) => {
                Some(open(&mut self.out, field.number()))
            }
            What::Content(_) | What::Packed(_) => None,
        }
    }

    fn end(&mut self, begin: Option<usize>) {
        if let Some(begin) = begin {
            close(&mut self.out, begin);
        }
    }

    /// The name of the message that is expected, where its JSON form is its own.
    fn free_kind(&self, what: What) -> Option<&'static str> {
        let descriptor = match what {
            What::Content(descriptor) => descriptor,
            What::Field(field, _) if field.is_map() || field.is_list() => return None,
            What::Field(field, _) | What::Element(field) => *field.kind().as_message()?,
            What::Packed(_) => return None,
        };
        Some(descriptor.full_name()).filter(|name| well_known::is_well_known(name))
    }

    /// A value of the wrong shape.
    pub(super) fn wrong<E: Error>(&mut self, what: What, got: &str) -> E {
        let wanted = match what {
            What::Field(field, _) if field.is_map() => "an object".to_owned(),
            What::Field(field, _) if field.is_list() => "a list".to_owned(),
            What::Field(field, _) | What::Element(field) => expected(field.kind()),
            What::Packed(kind) => expected(kind),
            What::Content(descriptor) => expected(Kind::Message(descriptor)),
        };
        match self.free_kind(what) {
            Some(name) if name != "google.protobuf.Any" => {
                self.fail(format!("not a {name}: got {got}"))
            }
            Some(_) => self.fail(format!("expected an object with \"@type\", got {got}")),
            None => self.fail(format!("expected {wanted}, got {got}")),
        }
    }

    fn map<'de, A: MapAccess<'de>>(
        &mut self,
        field: FieldDescriptor,
        mut map: A,
    ) -> Result<bool, A::Error> {
        let Kind::Message(entry) = field.kind() else {
            return Err(self.fail("a map without an entry type"));
        };
        let (key_kind, value) = (
            entry.map_entry_key_field().kind(),
            entry.map_entry_value_field(),
        );
        while let Some(key) = map.next_key::<String>()? {
            self.within(Segment::Key(key.clone(), true), |reader| {
                let begin = open(&mut reader.out, field.number());
                let text = Scalar::Text(&key);
                match (key_kind, key.as_str()) {
                    (Kind::Bool, "true" | "false") => {
                        reader.put(key_kind, Some(1), true, Scalar::Bool(key == "true"))?;
                    }
                    (Kind::Bool, _) => return Err(reader.fail("expected true or false as key")),
                    _ => reader.put(key_kind, Some(1), true, text)?,
                }
                map.next_value_seed(Seed {
                    reader,
                    what: What::Element(value),
                })?;
                close(&mut reader.out, begin);
                Ok(())
            })?;
        }
        Ok(true)
    }

    /// Elements of a `ListValue`.
    fn list_value<'de, A: SeqAccess<'de>>(&mut self, list: &mut A) -> Result<(), A::Error> {
        let mut index = 0;
        while self.within(Segment::Index(index), |reader| {
            list.next_element_seed(FreeSeed { reader, number: 1 })
                .map(|e| e.is_some())
        })? {
            index += 1;
        }
        Ok(())
    }

    /// Entries of a `Struct`.
    fn object_value<'de, A: MapAccess<'de>>(&mut self, map: &mut A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            let begin = open(&mut self.out, 1);
            write_bytes(&mut self.out, 1, key.as_bytes());
            self.within(Segment::Key(key, true), |reader| {
                map.next_value_seed(FreeSeed { reader, number: 2 })
            })?;
            close(&mut self.out, begin);
        }
        Ok(())
    }
}

/// Reads any JSON value as a `google.protobuf.Value` under a field number.
struct FreeSeed<'r> {
    reader: &'r mut Reader,
    number: u32,
}

impl<'de> DeserializeSeed<'de> for FreeSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        let begin = open(&mut self.reader.out, self.number);
        let value = MessageDescriptor::find("google.protobuf.Value");
        let value = value.expect("protobuf's own types are in the tables");
        let seed = Seed {
            reader: &mut *self.reader,
            what: What::Content(value),
        };
        seed.deserialize(from)?;
        close(&mut self.reader.out, begin);
        Ok(())
    }
}

/// How many bytes [`open`] wrote.
fn tag_and_length(field: FieldDescriptor) -> usize {
    let mut tag = Vec::with_capacity(6);
    open(&mut tag, field.number())
}

fn unknown_field(descriptor: MessageDescriptor, name: &str) -> String {
    let mut names: Vec<_> = descriptor.fields().map(|f| f.json_name()).collect();
    names.sort_unstable();
    let near = names
        .iter()
        .find(|n| n.eq_ignore_ascii_case(&name.replace(['_', '-'], "")));
    let message = descriptor.full_name();
    match near {
        Some(near) => format!("unknown field in {message}; did you mean {near}?"),
        None => format!("unknown field in {message}; it has {}", names.join(", ")),
    }
}
