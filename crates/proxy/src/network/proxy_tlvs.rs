//! What a TCP proxy adds to the TLVs of a connection, for the PROXY headers of its upstreams.

use std::sync::Arc;

use bytes::Bytes;

use super::exchange;
use crate::{
    access_log::{self, Lines},
    listener::{ConnectionInfo, ProxyData},
    plan::network::{ProxyTlvs, TlvMerge, TlvValue},
    proxy_protocol::Tlv,
};

/// The connection as PROXY headers tell of it, where that is not as it is. In a box: the many connections that the
/// configuration adds nothing to should not carry room for it.
pub(super) fn with(plan: &ProxyTlvs, info: &ConnectionInfo) -> Option<Box<ConnectionInfo>> {
    let had = info.proxy.as_ref();
    if plan.tlvs.is_empty() || had.is_some() && plan.merge == TlvMerge::AddIfAbsent {
        return None;
    }
    let own = plan.tlvs.iter().map(|(kind, value)| Tlv {
        kind: *kind,
        value: match value {
            TlvValue::Bytes(bytes) => bytes.clone(),
            TlvValue::Format(format) => {
                let mut text = Vec::new();
                access_log::write(format, &exchange(info, None, 0), Lines::Any, &mut text);
                Bytes::from(text)
            }
        },
    });
    let own: Vec<Tlv> = own.collect();
    let replaced = |tlv: &Tlv| own.iter().any(|own| own.kind == tlv.kind);
    let kept = had.iter().flat_map(|had| &had.tlvs);
    let tlvs = match plan.merge {
        TlvMerge::AddIfAbsent => own,
        TlvMerge::OverwriteByType => {
            let kept: Vec<_> = kept.filter(|tlv| !replaced(tlv)).cloned().collect();
            [own, kept].concat()
        }
        TlvMerge::Append => kept.cloned().chain(own).collect(),
    };
    let mut info = Box::new(info.clone());
    info.proxy = Some(Arc::new(ProxyData {
        tlvs,
        metadata: had.map(|had| had.metadata.clone()).unwrap_or_default(),
    }));
    Some(info)
}
