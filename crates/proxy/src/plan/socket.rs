//! Socket options that the configuration names by number, and the address that an upstream connection comes from.

use std::sync::Arc;

use socket2::Domain;

/// `envoy.config.core.v3.SocketOption`: passed to setsockopt(2) as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketOption {
    /// E.g. 6 for TCP.
    pub level: i32,
    /// The option's number on that level.
    pub name: i32,
    /// What it is set to.
    pub value: SocketOptionValue,
    /// When it is set.
    pub state: SocketState,
}

/// The value of a socket option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketOptionValue {
    /// An `int` in the machine's byte order.
    Int(i32),
    /// Any bytes.
    Bytes(Arc<[u8]>),
}

/// `SocketOption.SocketState`: the moment at which an option is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketState {
    /// Before bind(2); on upstream sockets before connect(2).
    Prebind,
    /// After bind(2).
    Bound,
    /// After listen(2); never on upstream sockets.
    Listening,
}

impl SocketOption {
    /// The value as setsockopt(2) takes it.
    pub fn bytes(&self) -> std::borrow::Cow<'_, [u8]> {
        match &self.value {
            SocketOptionValue::Int(value) => value.to_ne_bytes().to_vec().into(),
            SocketOptionValue::Bytes(bytes) => (&**bytes).into(),
        }
    }

    /// Whether it makes sense on a socket of this family: options of the level IPV6 are left out on IPv4 sockets, as
    /// a listener of both families has one list.
    pub fn applies_to(&self, domain: Domain) -> bool {
        !(self.level == libc::IPPROTO_IPV6 && domain == Domain::IPV4)
    }
}
