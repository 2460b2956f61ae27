//! A response, put together from bytes that all streams share.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    Mode, Resource,
    resource::{field_len, put_field},
};

/// An encoded `DeltaDiscoveryResponse` or `DiscoveryResponse`; the resources in it are not copied.
#[derive(Debug, Clone)]
pub struct Response {
    /// Its type.
    pub type_url: Arc<str>,
    /// What the client's answer will carry.
    pub nonce: Arc<str>,
    /// How many resources it brings.
    pub resources: usize,
    /// How many it takes away (delta only).
    pub removed: usize,
    segments: Vec<Bytes>,
}

impl Response {
    pub(super) fn new(
        mode: Mode,
        type_url: &Arc<str>,
        version: &str,
        nonce: String,
        resources: &[Arc<Resource>],
        removed: &[Arc<str>],
    ) -> Self {
        let capacity = field_len(version.len())
            + field_len(type_url.len())
            + field_len(nonce.len())
            + removed.iter().map(|n| field_len(n.len())).sum::<usize>();
        let mut head = BytesMut::with_capacity(capacity);
        // version_info and system_version_info share a number, and so do type_url and nonce.
        put_field(&mut head, 1, version.as_bytes());
        put_field(&mut head, 4, type_url.as_bytes());
        put_field(&mut head, 5, nonce.as_bytes());
        if mode == Mode::Delta {
            for name in removed {
                put_field(&mut head, 6, name.as_bytes());
            }
        }
        let mut segments = Vec::with_capacity(resources.len() + 1);
        segments.push(head.freeze());
        segments.extend(resources.iter().map(|r| match mode {
            Mode::Delta => r.delta_entry(),
            Mode::Sotw => r.sotw_entry(),
        }));
        Self {
            type_url: type_url.clone(),
            nonce: nonce.into(),
            resources: resources.len(),
            removed: removed.len(),
            segments,
        }
    }

    /// An answer outside of any subscription: whole, and not remembered. `control_plane` is an encoded `ControlPlane`.
    pub fn answer(
        mode: Mode,
        type_url: &str,
        version: &str,
        nonce: String,
        control_plane: &[u8],
        resources: &[Arc<Resource>],
    ) -> Self {
        let mut response = Self::new(mode, &type_url.into(), version, nonce, resources, &[]);
        let mut last = BytesMut::with_capacity(field_len(control_plane.len()));
        let field = match mode {
            Mode::Delta => 7,
            Mode::Sotw => 6,
        };
        put_field(&mut last, field, control_plane);
        response.segments.push(last.freeze());
        response
    }

    /// Bytes on the wire.
    pub fn encoded_len(&self) -> usize {
        self.segments.iter().map(Bytes::len).sum()
    }

    /// The pieces of the message, in order.
    pub(super) fn into_segments(self) -> Vec<Bytes> {
        self.segments
    }

    /// Writes the message.
    pub fn encode(&self, out: &mut impl BufMut) {
        for segment in &self.segments {
            out.put_slice(segment);
        }
    }
}
