//! The PROXY protocol at both ends, as configured.

use std::sync::Arc;

use super::cluster::UpstreamTransport;
use crate::proxy_protocol::{Tlv, Version};

/// `envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyProtocolFilter {
    /// TLVs that become dynamic metadata of the connection.
    pub rules: Vec<TlvRule>,
    /// A connection without a header goes on with its own addresses; else it is closed.
    pub allow_without_header: bool,
    /// TLVs that are kept for an upstream PROXY header.
    pub pass_through: PassThrough,
    /// Headers of these versions close the connection.
    pub disallowed_versions: Vec<Version>,
    /// `proxy_proto.<stat_prefix>.` in stats; without one `proxy_proto.`.
    pub stat_prefix: Arc<str>,
}

/// One TLV that becomes metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlvRule {
    /// Type of the TLV.
    pub tlv: u8,
    /// Namespace and key; without them the TLV is ignored. The namespace is
    /// `envoy.filters.listener.proxy_protocol` by default.
    pub metadata: Option<(Arc<str>, Arc<str>)>,
}

/// `ProxyProtocolPassThroughTLVs`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PassThrough {
    /// None.
    #[default]
    None,
    /// Every one.
    All,
    /// Those of these types.
    Types(Vec<u8>),
}

impl PassThrough {
    /// Whether a TLV of this type is kept.
    pub fn takes(&self, tlv: u8) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Types(types) => types.contains(&tlv),
        }
    }
}

/// `envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport`: a header before whatever else
/// is spoken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyProtocolTransport {
    /// Version of the header.
    pub version: Version,
    /// Which of the downstream header's TLVs are sent on. Version 2 only.
    pub pass_through: PassThrough,
    /// Sent always, and in place of a passed one of the same type. Version 2 only.
    pub added: Vec<Tlv>,
    /// What the bytes after the header are wrapped in.
    pub inner: UpstreamTransport,
}
