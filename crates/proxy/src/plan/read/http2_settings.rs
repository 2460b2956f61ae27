//! `custom_settings_parameters`: settings of HTTP/2 by their numbers.

use std::{collections::BTreeMap, sync::Arc};

use proto::envoy::config::core::v3::{self as core, http2_protocol_options::SettingsParameter};

use crate::plan::error::{At, Step};

/// What is said, by identifier.
pub(super) struct CustomSettings(BTreeMap<u16, u32>);

impl CustomSettings {
    /// Reads the list; `options` is the message that it stands in.
    pub(super) fn read(
        at: &At<'_>,
        list: &[SettingsParameter],
        options: &core::Http2ProtocolOptions,
    ) -> Self {
        let field = "custom_settings_parameters";
        let mut settings = BTreeMap::new();
        for (identifier, value) in at.each(field, list, |at, m| setting(at, options, m)) {
            let before = settings.insert(identifier, value);
            if before.is_some_and(|before| before != value) {
                at.field(field)
                    .error(format!("says two values of {identifier}"));
            }
        }
        Self(settings)
    }

    /// In place of `hpack_table_size`.
    pub(super) fn header_table(&self) -> Option<u32> {
        self.0.get(&HEADER_TABLE_SIZE).copied()
    }

    /// In place of `max_concurrent_streams`.
    pub(super) fn concurrent_streams(&self) -> Option<u32> {
        self.0.get(&MAX_CONCURRENT_STREAMS).copied()
    }

    /// In place of `initial_stream_window_size`.
    pub(super) fn stream_window(&self) -> Option<u32> {
        self.0.get(&INITIAL_WINDOW_SIZE).copied()
    }

    /// What is only said to the peer. A client always says that it wants no pushes, and a server cannot.
    pub(super) fn others(&self) -> Option<Arc<[(u16, u32)]>> {
        let others = self.0.iter().filter(|(identifier, _)| {
            !matches!(
                **identifier,
                HEADER_TABLE_SIZE | ENABLE_PUSH | MAX_CONCURRENT_STREAMS | INITIAL_WINDOW_SIZE
            )
        });
        let others: Arc<[_]> = others.map(|(i, v)| (*i, *v)).collect();
        (!others.is_empty()).then_some(others)
    }
}

/// `SettingsParameter`, with Envoy's rules for those that have a field of their own.
fn setting(
    at: At<'_>,
    options: &core::Http2ProtocolOptions,
    m: &SettingsParameter,
) -> Step<(u16, u32)> {
    let identifier = match m.identifier.map(u16::try_from) {
        Some(Ok(identifier)) => identifier,
        Some(Err(_)) => return Err(at.field("identifier").error("must be at most 65535")),
        None => return Err(at.field("identifier").error("is required")),
    };
    let Some(value) = m.value else {
        return Err(at.field("value").error("is required"));
    };
    let twice = |named: Option<u32>, field: &str| match named {
        None => Ok(()),
        Some(_) => Err(at.error(format!("is {field}, which is given as well"))),
    };
    match identifier {
        HEADER_TABLE_SIZE => twice(options.hpack_table_size, "hpack_table_size")?,
        ENABLE_PUSH if value != 0 => {
            return Err(at.field("value").error("must be 0: nothing is pushed"));
        }
        MAX_CONCURRENT_STREAMS => {
            twice(options.max_concurrent_streams, "max_concurrent_streams")?;
        }
        INITIAL_WINDOW_SIZE => {
            let named = options.initial_stream_window_size;
            twice(named, "initial_stream_window_size")?;
            if value > 0x7fff_ffff {
                return Err(at.field("value").error("must be at most 2147483647"));
            }
        }
        MAX_FRAME_SIZE => {
            return Err(at.not_implemented("MAX_FRAME_SIZE (5) is not implemented; remove it"));
        }
        MAX_HEADER_LIST_SIZE => {
            return Err(at.not_implemented(
                "MAX_HEADER_LIST_SIZE (6) is not implemented; write max_request_headers_kb",
            ));
        }
        ENABLE_CONNECT_PROTOCOL => {
            return Err(at.error("ENABLE_CONNECT_PROTOCOL (8) can only be given as allow_connect"));
        }
        _ => {}
    }
    Ok((identifier, value))
}

/// Identifiers of settings (RFC 9113 section 6.5.2, RFC 8441).
const HEADER_TABLE_SIZE: u16 = 1;
const ENABLE_PUSH: u16 = 2;
const MAX_CONCURRENT_STREAMS: u16 = 3;
const INITIAL_WINDOW_SIZE: u16 = 4;
const MAX_FRAME_SIZE: u16 = 5;
const MAX_HEADER_LIST_SIZE: u16 = 6;
const ENABLE_CONNECT_PROTOCOL: u16 = 8;
