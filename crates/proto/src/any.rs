//! `google.protobuf.Any`: packing and unpacking by type URL.

use prost::{Message, Name};
use prost_types::Any;

/// The part of a type URL that names the message (`type.googleapis.com/envoy.X` → `envoy.X`).
pub fn type_name(type_url: &str) -> &str {
    type_url.rsplit_once('/').map_or(type_url, |(_, name)| name)
}

/// Packs a message under `type.googleapis.com/FULL.NAME`.
pub fn pack<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

/// Whether `any` holds an `M`, whatever the authority in front of its name.
pub fn is<M: Name>(any: &Any) -> bool {
    type_name(&any.type_url) == M::full_name()
}

/// Unpacks an `M`; an error when the type URL names another message or the bytes do not decode.
pub fn unpack<M: Message + Name + Default>(any: &Any) -> Result<M, UnpackError> {
    if !is::<M>(any) {
        return Err(UnpackError::Type {
            want: M::full_name(),
            got: any.type_url.clone(),
        });
    }
    M::decode(any.value.as_slice()).map_err(|source| UnpackError::Decode {
        name: M::full_name(),
        source,
    })
}

/// Why an `Any` could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The bytes are not a message of the named type.
    #[error("{name}: {source}")]
    Decode {
        name: String,
        source: prost::DecodeError,
    },
    /// The `Any` holds another message than the field asks for.
    #[error("holds {got:?}, expected type.googleapis.com/{want}")]
    Type { want: String, got: String },
}
