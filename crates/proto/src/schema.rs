//! What is known of each message at run time: names, numbers and types of its fields.
//!
//! `build/schema.rs` lays the tables out; they are read where they lie in the program's file. Descriptors are numbers, free
//! to copy.

use std::fmt;

/// A message of this crate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MessageDescriptor(u32);

/// A field of a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FieldDescriptor {
    message: MessageDescriptor,
    /// Place within the message, in the order of numbers.
    place: u32,
}

/// An enum of this crate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct EnumDescriptor(u32);

/// The type of a field (of its elements, for a list).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the types of protobuf")]
pub enum Kind {
    Double,
    Float,
    Int64,
    Uint64,
    Int32,
    Fixed64,
    Fixed32,
    Bool,
    String,
    Message(MessageDescriptor),
    Bytes,
    Uint32,
    Enum(EnumDescriptor),
    Sfixed32,
    Sfixed64,
    Sint32,
    Sint64,
}

impl Kind {
    /// The message, for a field that holds one.
    pub fn as_message(&self) -> Option<&MessageDescriptor> {
        match self {
            Self::Message(message) => Some(message),
            _ => None,
        }
    }
}

impl MessageDescriptor {
    /// The message of this full name (`envoy.config.core.v3.Node`).
    pub fn find(full_name: &str) -> Option<Self> {
        let (mut low, mut high) = (0, word(0));
        while low < high {
            let middle = low.midpoint(high);
            match Self(middle).full_name().cmp(full_name) {
                std::cmp::Ordering::Equal => return Some(Self(middle)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// With its package.
    pub fn full_name(&self) -> &'static str {
        name(self.at())
    }

    /// In the order of their numbers.
    pub fn fields(&self) -> impl ExactSizeIterator<Item = FieldDescriptor> + use<> {
        let message = *self;
        (0..word(self.at() + 12)).map(move |place| FieldDescriptor { message, place })
    }

    /// The field of this name as JSON writes it (`connectTimeout`).
    pub fn get_field_by_json_name(&self, json_name: &str) -> Option<FieldDescriptor> {
        self.fields()
            .find(|field| bytes(field.at() + 8) == json_name.as_bytes())
    }

    /// The field of this name as the API writes it (`connect_timeout`).
    pub fn get_field_by_name(&self, name: &str) -> Option<FieldDescriptor> {
        self.fields()
            .find(|field| bytes(field.at()) == name.as_bytes())
    }

    /// The field of this number on the wire.
    pub fn get_field(&self, number: u32) -> Option<FieldDescriptor> {
        let (mut low, mut high) = (0, word(self.at() + 12));
        while low < high {
            let place = low.midpoint(high);
            let field = FieldDescriptor {
                message: *self,
                place,
            };
            match field.number().cmp(&number) {
                std::cmp::Ordering::Equal => return Some(field),
                std::cmp::Ordering::Less => low = place + 1,
                std::cmp::Ordering::Greater => high = place,
            }
        }
        None
    }

    /// The key of a map's entry; an entry has two fields, 1 and 2.
    pub fn map_entry_key_field(&self) -> FieldDescriptor {
        FieldDescriptor {
            message: *self,
            place: 0,
        }
    }

    /// The value of a map's entry.
    pub fn map_entry_value_field(&self) -> FieldDescriptor {
        FieldDescriptor {
            message: *self,
            place: 1,
        }
    }

    fn at(self) -> usize {
        word(4) as usize + self.0 as usize * 20
    }
}

impl FieldDescriptor {
    /// As the API writes it.
    pub fn name(&self) -> &'static str {
        name(self.at())
    }

    /// As JSON writes it.
    pub fn json_name(&self) -> &'static str {
        name(self.at() + 8)
    }

    /// On the wire.
    pub fn number(&self) -> u32 {
        word(self.at() + 16)
    }

    /// Its type.
    pub fn kind(&self) -> Kind {
        let target = word(self.at() + 24);
        // Numbers of `google.protobuf.FieldDescriptorProto.Type`.
        match self.shape() & 0xff {
            1 => Kind::Double,
            2 => Kind::Float,
            3 => Kind::Int64,
            4 => Kind::Uint64,
            5 => Kind::Int32,
            6 => Kind::Fixed64,
            7 => Kind::Fixed32,
            8 => Kind::Bool,
            9 => Kind::String,
            10 | 11 => Kind::Message(MessageDescriptor(target)),
            12 => Kind::Bytes,
            13 => Kind::Uint32,
            14 => Kind::Enum(EnumDescriptor(target)),
            15 => Kind::Sfixed32,
            16 => Kind::Sfixed64,
            17 => Kind::Sint32,
            _ => Kind::Sint64,
        }
    }

    /// Repeated, and no map.
    pub fn is_list(&self) -> bool {
        self.shape() & (1 << 8) != 0
    }

    /// A map: its type is that of its entries.
    pub fn is_map(&self) -> bool {
        self.shape() & (1 << 9) != 0
    }

    /// "Not set" and "set to the default" are different.
    pub fn has_presence(&self) -> bool {
        self.shape() & (1 << 10) != 0
    }

    /// A list of numbers that is written in one piece.
    pub fn is_packed(&self) -> bool {
        self.shape() & (1 << 11) != 0
    }

    /// Which of the message's oneofs it belongs to, and the name of that.
    pub fn containing_oneof(&self) -> Option<(u32, &'static str)> {
        let index = word(self.at() + 28);
        let first = word(self.message.at() + 16);
        let at = || word(20) as usize + (first + index) as usize * 8;
        (index != u32::MAX).then(|| (index, name(at())))
    }

    /// Its place among the fields of its message, below 256.
    pub(crate) fn place(&self) -> u8 {
        self.place as u8
    }

    fn shape(self) -> u32 {
        word(self.at() + 20)
    }

    fn at(self) -> usize {
        word(8) as usize + (word(self.message.at() + 8) + self.place) as usize * 32
    }
}

impl EnumDescriptor {
    /// With its package.
    pub fn full_name(&self) -> &'static str {
        name(self.at())
    }

    /// Names and numbers as declared.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, i32)> + use<> {
        let (first, count) = (word(self.at() + 8), word(self.at() + 12));
        (first..first + count).map(|value| {
            let at = word(16) as usize + value as usize * 12;
            (name(at), word(at + 8) as i32)
        })
    }

    fn at(self) -> usize {
        word(12) as usize + self.0 as usize * 16
    }
}

impl fmt::Debug for MessageDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.full_name())
    }
}

impl fmt::Debug for FieldDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}.{}", self.message, self.name())
    }
}

impl fmt::Debug for EnumDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.full_name())
    }
}

fn word(at: usize) -> u32 {
    let bytes = TABLES[at..at + 4]
        .try_into()
        .expect("four bytes were taken");
    u32::from_le_bytes(bytes)
}

/// The name that two words at `at` lead to.
fn bytes(at: usize) -> &'static [u8] {
    let begin = word(24) as usize + word(at) as usize;
    &TABLES[begin..begin + word(at + 4) as usize]
}

fn name(at: usize) -> &'static str {
    std::str::from_utf8(bytes(at)).expect("protobuf's names are ASCII")
}

static TABLES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/schema.bin"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_knows_its_fields() {
        let cluster = MessageDescriptor::find("envoy.config.cluster.v3.Cluster").unwrap();
        assert_eq!(cluster.full_name(), "envoy.config.cluster.v3.Cluster");
        let timeout = cluster.get_field_by_json_name("connectTimeout").unwrap();
        assert_eq!((timeout.name(), timeout.number()), ("connect_timeout", 4));
        assert_eq!(cluster.get_field(4), Some(timeout));
        assert_eq!(cluster.get_field_by_name("connect_timeout"), Some(timeout));
        assert!(timeout.has_presence() && !timeout.is_list());
        let kind = timeout.kind();
        assert_eq!(
            kind.as_message().unwrap().full_name(),
            "google.protobuf.Duration"
        );
        let kind = cluster.get_field_by_name("type").unwrap();
        assert_eq!(kind.containing_oneof().unwrap().1, "cluster_discovery_type");
        let Kind::Enum(kind) = kind.kind() else {
            panic!("{kind:?}")
        };
        assert_eq!(kind.values().nth(1), Some(("STRICT_DNS", 1)));
        let map = cluster
            .get_field_by_name("typed_extension_protocol_options")
            .unwrap();
        assert!(map.is_map() && !map.is_list());
        assert_eq!(cluster.get_field(3_000_000), None);
        assert_eq!(MessageDescriptor::find("no.Such"), None);
    }
}
