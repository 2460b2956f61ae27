//! Values in the form that messages have.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use proto::{
    envoy::config::core::v3::{self as core, address, socket_address},
    prost_types::{
        Duration as ProtoDuration, ListValue, Struct, Timestamp, Value as ProtoValue, value::Kind,
    },
};
use serde_json::Value;

pub(super) fn address(address: SocketAddr) -> core::Address {
    core::Address {
        address: Some(address::Address::SocketAddress(core::SocketAddress {
            address: address.ip().to_string(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(
                address.port().into(),
            )),
            ..Default::default()
        })),
    }
}

pub(super) fn metadata(by_namespace: Vec<(String, Value)>) -> core::Metadata {
    let each = by_namespace.into_iter();
    core::Metadata {
        filter_metadata: each
            .map(|(name, value)| (name, structure(&value)))
            .collect(),
        ..Default::default()
    }
}

pub(super) fn structure(value: &Value) -> Struct {
    let members = value.as_object().into_iter().flatten();
    Struct {
        fields: members
            .map(|(name, value)| (name.clone(), proto_value(value)))
            .collect(),
    }
}

fn proto_value(value: &Value) -> ProtoValue {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(yes) => Kind::BoolValue(*yes),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(list) => Kind::ListValue(ListValue {
            values: list.iter().map(proto_value).collect(),
        }),
        Value::Object(_) => Kind::StructValue(structure(value)),
    };
    ProtoValue { kind: Some(kind) }
}

/// Texts of messages are UTF-8; any other byte becomes `!`, as in Envoy, so that the service sees that it is there.
pub(super) fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let mut out = String::new();
        for chunk in error.as_bytes().utf8_chunks() {
            out.push_str(chunk.valid());
            out.extend(chunk.invalid().iter().map(|_| '!'));
        }
        out
    })
}

pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: since.as_secs() as i64,
        nanos: since.subsec_nanos() as i32,
    }
}

pub(super) fn duration(time: Duration) -> ProtoDuration {
    ProtoDuration {
        seconds: time.as_secs() as i64,
        nanos: time.subsec_nanos() as i32,
    }
}
