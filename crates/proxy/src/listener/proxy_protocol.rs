//! The listener filter `proxy_protocol`: takes a PROXY header off the stream and believes it.

use std::{net::SocketAddr, sync::Arc};

use bytes::{Buf, BytesMut};
use serde_json::Value;

use super::{
    connection::{ConnectionInfo, ProxyData},
    filters::{FilterEnd, more},
};
use crate::{
    io::Stream,
    plan::proxy_protocol::ProxyProtocolFilter,
    proxy_protocol::{Header, Malformed, Parsed, Version, parse},
};

stats::group! {
    /// `proxy_proto.` or `proxy_proto.PREFIX.`
    struct ProxyProtocolStats {
        counter not_found_allowed,
        counter not_found_disallowed,
    }
}

stats::group! {
    /// `versions.v1.` and `versions.v2.` below that.
    struct VersionStats {
        counter disallowed,
        counter error,
        counter found,
    }
}

/// Reads the header and takes its addresses and TLVs over. What follows it stays in `peeked`.
pub(super) async fn read(
    plan: &ProxyProtocolFilter,
    stream: &mut Stream,
    info: &mut ConnectionInfo,
    peeked: &mut BytesMut,
    stats: &stats::Stats,
) -> Result<(), FilterEnd> {
    let scope = match &*plan.stat_prefix {
        "" => stats.scope("proxy_proto."),
        prefix => stats.scope(&format!("proxy_proto.{prefix}.")),
    };
    let version_stats = |version| {
        VersionStats::new(scope.scope(match version {
            Version::V1 => "versions.v1.",
            Version::V2 => "versions.v2.",
        }))
    };
    loop {
        match parse(peeked) {
            Ok(Parsed::More) => more(stream, peeked).await?,
            Ok(Parsed::Absent) if plan.allow_without_header => {
                ProxyProtocolStats::new(scope).not_found_allowed().inc();
                return Ok(());
            }
            Ok(Parsed::Absent) => {
                ProxyProtocolStats::new(scope).not_found_disallowed().inc();
                return Err(FilterEnd::Refused);
            }
            Ok(Parsed::Header(header, length)) => {
                let stats = version_stats(header.version);
                if plan.disallowed_versions.contains(&header.version) {
                    stats.disallowed().inc();
                    return Err(FilterEnd::Refused);
                }
                stats.found().inc();
                peeked.advance(length);
                believe(plan, header, info);
                return Ok(());
            }
            Err(error @ Malformed { version, .. }) => {
                version_stats(version).error().inc();
                tracing::debug!(
                    connection = info.id,
                    peer = info.direct_remote.map(tracing::field::display),
                    %error,
                    "refused a connection"
                );
                return Err(FilterEnd::Refused);
            }
        }
    }
}

fn believe(plan: &ProxyProtocolFilter, header: Header, info: &mut ConnectionInfo) {
    if let Some((client, destination)) = header.addresses {
        info.remote = Some(canonical(client));
        let destination = canonical(destination);
        if info.local != Some(destination) {
            info.local = Some(destination);
            info.local_restored = true;
        }
    }
    let mut data = ProxyData::default();
    for tlv in header.tlvs {
        for rule in plan.rules.iter().filter(|rule| rule.tlv == tlv.kind) {
            let Some((namespace, key)) = &rule.metadata else {
                continue;
            };
            let value = String::from_utf8_lossy(&tlv.value).into_owned();
            let fields = data
                .metadata
                .entry(namespace.to_string())
                .or_insert_with(|| Value::Object(Default::default()));
            if let Value::Object(fields) = fields {
                fields.insert(key.to_string(), Value::String(value));
            }
        }
        if plan.pass_through.takes(tlv.kind) {
            data.tlvs.push(tlv);
        }
    }
    // Nothing is kept is not the same as no header.
    info.proxy = Some(Arc::new(data));
}

/// A v4 address in v6 form is a v4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
