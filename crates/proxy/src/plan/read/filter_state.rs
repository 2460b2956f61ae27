//! `set_filter_state` of connections and of requests.

use proto::envoy::extensions::filters::{
    common::set_filter_state::v3 as common, http::set_filter_state::v3::Config as HttpConfig,
    network::set_filter_state::v3::Config as NetworkConfig,
};

use super::{access_log::plain_log_format, common::enumeration};
use crate::plan::{
    error::{At, Step},
    filter_state::{ConnectionState, ObjectKind, RequestState, StateValue},
};

/// The network filter.
pub(super) fn connection_state(at: At<'_>, m: &NetworkConfig) -> Step<ConnectionState> {
    let NetworkConfig {
        on_new_connection,
        on_downstream_tls_handshake,
        on_downstream_data,
    } = m;
    let mut on_begin = at.each("on_new_connection", on_new_connection, value);
    // Network filters run after the handshake; without TLS these are made with the others in Envoy, too.
    on_begin.extend(at.each(
        "on_downstream_tls_handshake",
        on_downstream_tls_handshake,
        value,
    ));
    Ok(ConnectionState {
        on_begin,
        on_data: at.each("on_downstream_data", on_downstream_data, value),
    })
}

/// The HTTP filter, and what a route says of it.
pub(super) fn request_state(at: At<'_>, m: &HttpConfig) -> Step<RequestState> {
    let HttpConfig {
        on_request_headers,
        clear_route_cache,
    } = m;
    Ok(RequestState {
        on_request: at.each("on_request_headers", on_request_headers, value),
        clear_route_cache: *clear_route_cache,
    })
}

fn value(at: At<'_>, m: &common::FilterStateValue) -> Step<StateValue> {
    use common::filter_state_value::{Key, SharedWithUpstream, Value};
    let common::FilterStateValue {
        factory_key,
        read_only,
        shared_with_upstream,
        skip_if_empty,
        key,
        value,
    } = m;
    // No filter of an upstream connection reads it.
    enumeration::<SharedWithUpstream>(&at, "shared_with_upstream", *shared_with_upstream)?;
    let Some(Key::ObjectKey(key)) = key else {
        return Err(at.error("needs object_key"));
    };
    let key = at.text("object_key", key)?;
    let kind = match factory_key.as_str() {
        "" => ObjectKind::made_by(&key).ok_or_else(|| {
            at.field("object_key").not_implemented(format!(
                "`{key}` is no key that has a factory here; to keep a text under it, write \
                 factory_key: envoy.string or envoy.hashable_string"
            ))
        })?,
        name => ObjectKind::made_by(name).ok_or_else(|| {
            at.field("factory_key").not_implemented(format!(
                "there is no factory `{name}`; write envoy.string or envoy.hashable_string for a text"
            ))
        })?,
    };
    let Some(Value::FormatString(format)) = value else {
        return Err(at.error("needs format_string"));
    };
    Ok(StateValue {
        kind,
        format: plain_log_format(at.field("format_string"), format)?,
        key,
        read_only: *read_only,
        skip_if_empty: *skip_if_empty,
    })
}
