//! Envoy's messages, as tests say them.

use prost::{Message, Name};

/// The message of some YAML, which has to be one.
pub fn message<M: Message + Name + Default>(yaml: &str) -> M {
    proto::json::from_yaml(yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"))
}

/// What is between the brackets of `lb_endpoints`: these ports of this machine.
pub fn hosts(ports: &[u16]) -> String {
    let host = |port: &u16| {
        format!(
            "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}"
        )
    };
    ports.iter().map(host).collect::<Vec<_>>().join(", ")
}
