//! A resource, encoded once, and the set of them that one view of the mesh consists of.

use std::{fmt::Write, hash::BuildHasher, sync::Arc};

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{encode_varint, encoded_len_varint};

/// One encoded resource. Cloning an `Arc` of it is all that a further proxy costs.
#[derive(Debug, PartialEq, Eq)]
pub struct Resource {
    name: Arc<str>,
    version: u64,
    /// Field 2 of `DeltaDiscoveryResponse`, tag and length included. The embedded `Any` comes last and is itself a
    /// field 2, so that the tail of these bytes is at the same time an entry of `DiscoveryResponse`.
    entry: Bytes,
    /// Where that tail begins.
    any_at: usize,
    /// Where the message itself begins.
    value_at: usize,
}

impl Resource {
    /// Encodes `value`, a serialised message of type `type_url`. The version is a hash of the content, so that it
    /// means the same after a restart and on another replica.
    pub fn new(name: impl Into<Arc<str>>, type_url: &str, value: &[u8]) -> Self {
        let name = name.into();
        let version = foldhash::quality::FixedState::default().hash_one(value);
        let version_text = version_text(version);
        let any_len = field_len(type_url.len()) + field_len(value.len());
        let inner = field_len(version_text.len()) + field_len(name.len()) + field_len(any_len);
        let mut out = BytesMut::with_capacity(field_len(inner));
        put_header(&mut out, 2, inner);
        put_field(&mut out, 1, version_text.as_bytes());
        put_field(&mut out, 3, name.as_bytes());
        let any_at = out.len();
        put_header(&mut out, 2, any_len);
        put_field(&mut out, 1, type_url.as_bytes());
        put_header(&mut out, 2, value.len());
        let value_at = out.len();
        out.put_slice(value);
        Self {
            name,
            version,
            entry: out.freeze(),
            any_at,
            value_at,
        }
    }

    /// The name by which it is subscribed to.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Hash of the content.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The serialised message, without any wrapping.
    pub fn value(&self) -> Bytes {
        self.entry.slice(self.value_at..)
    }

    /// Bytes on the wire in a delta response.
    pub fn encoded_len(&self) -> usize {
        self.entry.len()
    }

    pub(crate) fn delta_entry(&self) -> Bytes {
        self.entry.clone()
    }

    pub(crate) fn sotw_entry(&self) -> Bytes {
        self.entry.slice(self.any_at..)
    }
}

/// The text form of a resource version.
pub(crate) fn version_text(version: u64) -> String {
    let mut text = String::with_capacity(16);
    write!(text, "{version:016x}").expect("writing to a string does not fail");
    text
}

/// All resources of one type that a view holds, sorted by name; shared by every proxy with that view.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ResourceSet {
    resources: Vec<Arc<Resource>>,
}

impl ResourceSet {
    /// Sorts the resources; of two with one name the first stays.
    pub fn new(mut resources: Vec<Arc<Resource>>) -> Self {
        resources.sort_by(|a, b| a.name.cmp(&b.name));
        resources.dedup_by(|later, first| later.name == first.name);
        Self { resources }
    }

    /// The resource of that name.
    pub fn find(&self, name: &str) -> Option<&Arc<Resource>> {
        let at = self
            .resources
            .binary_search_by(|r| (*r.name).cmp(name))
            .ok()?;
        self.resources.get(at)
    }

    /// In order of name.
    pub fn iter(&self) -> std::slice::Iter<'_, Arc<Resource>> {
        self.resources.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.resources.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }
}

impl FromIterator<Arc<Resource>> for ResourceSet {
    fn from_iter<I: IntoIterator<Item = Arc<Resource>>>(iter: I) -> Self {
        Self::new(iter.into_iter().collect())
    }
}

/// Length of a length-delimited field (number below 16) with `len` bytes of content.
pub(crate) fn field_len(len: usize) -> usize {
    1 + encoded_len_varint(len as u64) + len
}

pub(crate) fn put_header(out: &mut BytesMut, number: u8, len: usize) {
    out.put_u8(number << 3 | 2);
    encode_varint(len as u64, out);
}

pub(crate) fn put_field(out: &mut BytesMut, number: u8, content: &[u8]) {
    put_header(out, number, content.len());
    out.put_slice(content);
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use proto::envoy::service::discovery::v3 as discovery;

    use super::*;
    use crate::type_url::CDS;

    #[test]
    fn one_encoding_serves_both_forms() {
        let resource = Resource::new("a", CDS, b"\x0a\x01a");
        let delta = discovery::DeltaDiscoveryResponse::decode(resource.delta_entry())
            .unwrap()
            .resources;
        assert_eq!(delta[0].name, "a");
        assert_eq!(delta[0].version, version_text(resource.version()));
        let any = delta[0].resource.clone().unwrap();
        assert_eq!(
            (any.type_url.as_str(), any.value.as_slice()),
            (CDS, &b"\x0a\x01a"[..])
        );
        let sotw = discovery::DiscoveryResponse::decode(resource.sotw_entry())
            .unwrap()
            .resources;
        assert_eq!(sotw, [any]);
        assert_eq!(resource.value(), &b"\x0a\x01a"[..]);
    }
}
