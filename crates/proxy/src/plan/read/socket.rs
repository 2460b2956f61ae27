//! Socket options, source addresses of upstream connections, and the PROXY protocol.

use std::sync::Arc;

use proto::envoy::{
    config::core::v3 as core,
    extensions::{
        filters::listener::proxy_protocol::v3 as filter_pb,
        transport_sockets::proxy_protocol::v3 as transport_pb,
    },
};

use super::{
    cluster::upstream_transport,
    common::{enumeration, socket_address},
};
use crate::{
    plan::{
        address::Address,
        cluster::{BindConfig, UpstreamTransport},
        error::{At, Step, unsupported},
        proxy_protocol::{PassThrough, ProxyProtocolFilter, ProxyProtocolTransport, TlvRule},
        socket::{SocketOption, SocketOptionValue, SocketState},
    },
    proxy_protocol::{Tlv, Version},
};

/// A list of `SocketOption`; options for datagram sockets alone are none of ours.
pub(super) fn socket_options(
    at: &At<'_>,
    name: &str,
    list: &[core::SocketOption],
) -> Arc<[SocketOption]> {
    at.each(name, list, socket_option)
        .into_iter()
        .flatten()
        .collect()
}

fn socket_option(at: At<'_>, m: &core::SocketOption) -> Step<Option<SocketOption>> {
    use core::socket_option::Value;
    let core::SocketOption {
        // For whoever reads the configuration.
        description: _,
        level,
        name,
        state,
        r#type,
        value,
        ip_version,
    } = m;
    unsupported!(at, ip_version);
    let number = |field: &str, number: i64| {
        i32::try_from(number).map_err(|_| at.field(field).error("does not fit an option's number"))
    };
    let (level, name) = (number("level", *level)?, number("name", *name)?);
    let value = match value {
        Some(Value::IntValue(value)) => SocketOptionValue::Int(
            i32::try_from(*value)
                .map_err(|_| at.field("int_value").error("does not fit 32 bits"))?,
        ),
        Some(Value::BufValue(bytes)) => SocketOptionValue::Bytes(bytes.as_slice().into()),
        None => return Err(at.error("needs one of int_value, buf_value")),
    };
    use core::socket_option::SocketState as S;
    let state = match enumeration(&at, "state", *state)? {
        S::StatePrebind => SocketState::Prebind,
        S::StateBound => SocketState::Bound,
        S::StateListening => SocketState::Listening,
    };
    let datagram_only = r#type
        .as_ref()
        .is_some_and(|kind| kind.datagram.is_some() && kind.stream.is_none());
    Ok((!datagram_only).then_some(SocketOption {
        level,
        name,
        value,
        state,
    }))
}

/// `TcpKeepalive` of a listener, as the options of its sockets that those of connections inherit. A value of 0 turns it
/// off.
pub(super) fn keepalive_options(m: &core::TcpKeepalive) -> Vec<SocketOption> {
    let option = |level, name, value: u32| SocketOption {
        level,
        name,
        value: SocketOptionValue::Int(i32::try_from(value).unwrap_or(i32::MAX)),
        state: SocketState::Prebind,
    };
    let fields = [
        (libc::TCP_KEEPCNT, m.keepalive_probes),
        (libc::TCP_KEEPIDLE, m.keepalive_time),
        (libc::TCP_KEEPINTVL, m.keepalive_interval),
    ];
    let off = fields.iter().any(|(_, value)| *value == Some(0));
    let mut options = vec![option(
        libc::SOL_SOCKET,
        libc::SO_KEEPALIVE,
        u32::from(!off),
    )];
    if !off {
        let given = fields
            .iter()
            .filter_map(|(name, value)| Some((*name, (*value)?)));
        options.extend(given.map(|(name, value)| option(libc::IPPROTO_TCP, name, value)));
    }
    options
}

/// `BindConfig`.
pub(super) fn bind_config(at: At<'_>, m: &core::BindConfig) -> Step<BindConfig> {
    let core::BindConfig {
        source_address,
        freebind,
        socket_options: options,
        extra_source_addresses,
        additional_source_addresses,
        local_address_selector,
        validate_network_namespaces,
    } = m;
    unsupported!(at, local_address_selector, validate_network_namespaces);
    let socket = |at: At<'_>, m: &core::SocketAddress| match socket_address(at, m, false)? {
        Address::Socket(address) => Ok(address),
        _ => Err(at.error("must be an IP address")),
    };
    let source = at.optional("source_address", source_address, socket)?;
    let mut sources: Vec<_> = source.into_iter().collect();
    sources.extend(at.each(
        "additional_source_addresses",
        additional_source_addresses,
        socket,
    ));
    sources.extend(
        at.each("extra_source_addresses", extra_source_addresses, |at, m| {
            let core::ExtraSourceAddress {
                address,
                socket_options,
            } = m;
            unsupported!(at, socket_options);
            at.required("address", address, socket)
        }),
    );
    if source.is_none() && !sources.is_empty() {
        at.field("source_address")
            .error("is required where further source addresses are given");
    }
    Ok(BindConfig {
        sources,
        freebind: freebind.unwrap_or(false),
        socket_options: socket_options(&at, "socket_options", options),
    })
}

/// The listener filter.
pub(super) fn proxy_protocol_filter(
    at: At<'_>,
    m: &filter_pb::ProxyProtocol,
) -> Step<ProxyProtocolFilter> {
    use filter_pb::proxy_protocol::{KeyValuePair, Rule};
    let filter_pb::ProxyProtocol {
        rules,
        allow_requests_without_proxy_protocol,
        pass_through_tlvs,
        disallowed_versions,
        stat_prefix,
        tlv_location,
    } = m;
    unsupported!(at, tlv_location);
    let rules = at.each("rules", rules, |at, m| {
        let Rule {
            tlv_type,
            on_tlv_present,
        } = m;
        let tlv = tlv_kind(at.field("tlv_type"), *tlv_type)?;
        let metadata = at.optional("on_tlv_present", on_tlv_present, |at, m| {
            let KeyValuePair {
                metadata_namespace,
                key,
                value_string_encoding,
            } = m;
            unsupported!(at, value_string_encoding);
            let namespace = match metadata_namespace.as_str() {
                "" => TLV_NAMESPACE,
                given => given,
            };
            Ok((namespace.into(), at.text("key", key)?))
        })?;
        Ok(TlvRule { tlv, metadata })
    });
    let disallowed = at.each("disallowed_versions", disallowed_versions, |at, number| {
        version(&at, *number)
    });
    Ok(ProxyProtocolFilter {
        rules,
        allow_without_header: *allow_requests_without_proxy_protocol,
        pass_through: pass_through(&at, pass_through_tlvs)?,
        disallowed_versions: disallowed,
        stat_prefix: stat_prefix.as_str().into(),
    })
}

/// The upstream transport socket.
pub(super) fn proxy_protocol_transport(
    at: At<'_>,
    m: &transport_pb::ProxyProtocolUpstreamTransport,
) -> Step<ProxyProtocolTransport> {
    let transport_pb::ProxyProtocolUpstreamTransport {
        config,
        transport_socket,
        allow_unspecified_address,
        // Connections are never shared by requests whose headers would differ in anything.
        tlv_as_pool_key: _,
    } = m;
    unsupported!(at, allow_unspecified_address);
    let inner = at.required("transport_socket", transport_socket, upstream_transport)?;
    if matches!(inner, UpstreamTransport::ProxyProtocol(_)) {
        return Err(at
            .field("transport_socket")
            .error("a connection has one PROXY header"));
    }
    let usual = core::ProxyProtocolConfig::default();
    let config = config.as_ref().unwrap_or(&usual);
    let at = at.field("config");
    let core::ProxyProtocolConfig {
        version: number,
        pass_through_tlvs,
        added_tlvs,
    } = config;
    let added = at.each("added_tlvs", added_tlvs, |at, m| {
        let core::TlvEntry {
            r#type,
            value,
            format_string,
        } = m;
        unsupported!(at, format_string);
        if u16::try_from(value.len()).is_err() {
            at.field("value").error("must be at most 65535 bytes");
        }
        Ok(Tlv {
            kind: tlv_kind(at.field("type"), *r#type)?,
            value: value.clone().into(),
        })
    });
    Ok(ProxyProtocolTransport {
        version: version(&at.field("version"), *number)?,
        pass_through: pass_through(&at, pass_through_tlvs)?,
        added,
        inner,
    })
}

/// A PROXY header that says where a connection comes from and nothing else.
pub(super) fn bare_header(at: At<'_>, m: &core::ProxyProtocolConfig) -> Step<Version> {
    let core::ProxyProtocolConfig {
        version: number,
        pass_through_tlvs,
        added_tlvs,
    } = m;
    unsupported!(at, pass_through_tlvs, added_tlvs);
    version(&at.field("version"), *number)
}

/// Of a PROXY header.
fn version(at: &At<'_>, number: i32) -> Step<Version> {
    use core::proxy_protocol_config::Version as V;
    match V::try_from(number) {
        Ok(V::V1) => Ok(Version::V1),
        Ok(V::V2) => Ok(Version::V2),
        Err(_) => Err(at.error(format!("{number} is not one of this field's values"))),
    }
}

/// The type of a TLV.
pub(super) fn tlv_kind(at: At<'_>, number: u32) -> Step<u8> {
    u8::try_from(number).map_err(|_| at.error("must be below 256"))
}

fn pass_through(at: &At<'_>, m: &Option<core::ProxyProtocolPassThroughTlVs>) -> Step<PassThrough> {
    use core::proxy_protocol_pass_through_tl_vs::PassTlVsMatchType as M;
    let passed = at.optional("pass_through_tlvs", m, |at, m| {
        let core::ProxyProtocolPassThroughTlVs {
            match_type,
            tlv_type,
        } = m;
        match enumeration(&at, "match_type", *match_type)? {
            M::IncludeAll => Ok(PassThrough::All),
            M::Include => Ok(PassThrough::Types(at.each(
                "tlv_type",
                tlv_type,
                |at, number| tlv_kind(at, *number),
            ))),
        }
    })?;
    Ok(passed.unwrap_or_default())
}

/// Where a rule's metadata goes unless it says otherwise.
const TLV_NAMESPACE: &str = "envoy.filters.listener.proxy_protocol";
