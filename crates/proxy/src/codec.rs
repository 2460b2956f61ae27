//! HTTP/1 and HTTP/2 as both sides of the proxy set them up, and what is counted of HTTP/2.

use std::{cell::Cell, rc::Rc};

use outrigger_http::{Http1Grammar, Limits, h1, h2};

use crate::plan::{
    Cluster,
    http::{HeaderCase, Http1Options, Http2Options},
};

/// What messages of HTTP/1 may say.
pub(crate) fn http1_grammar(options: &Http1Options) -> Http1Grammar {
    Http1Grammar {
        custom_methods: options.allow_custom_methods,
        chunked_length: options.allow_chunked_length,
        absolute_url: options.allow_absolute_url,
    }
}

/// The limits of what hosts of a cluster answer over HTTP/1.
pub(crate) fn response_limits(plan: &Cluster) -> Limits {
    Limits {
        head_bytes: plan.http.max_response_headers_kb as usize * 1024,
        headers: plan.http.max_headers_count as usize,
        trailers: plan.http1.enable_trailers,
        http1: http1_grammar(&plan.http1),
        ..Limits::default()
    }
}

/// How heads of HTTP/1 are written. Case is kept also where Envoy would write small letters.
pub(crate) fn http1_spelling(options: &Http1Options) -> h1::Spelling {
    h1::Spelling {
        proper_case: options.header_case == HeaderCase::Proper,
        absolute_url: options.send_fully_qualified_url,
    }
}

/// The settings of a connection; the limits of heads come from the options of all protocols.
pub(crate) fn http2_settings(options: &Http2Options, head_kb: u32, headers: u32) -> h2::Settings {
    h2::Settings {
        stream_window: options.initial_stream_window_size,
        connection_window: options.initial_connection_window_size,
        concurrent_streams: options.max_concurrent_streams,
        header_list: head_kb.saturating_mul(1024),
        header_field: match options.max_header_field_size_kb {
            Some(kb) => kb * 1024,
            None => u32::MAX,
        },
        obs_text: !options.disallow_obs_text,
        huffman: options.huffman,
        headers: headers as usize,
        extended_connect: options.allow_connect,
        header_table: options.hpack_table_size,
        custom: options.custom_settings.clone(),
        floods: h2::FloodLimits {
            max_consecutive_inbound_frames_with_empty_payload: options
                .max_consecutive_inbound_frames_with_empty_payload,
            max_inbound_priority_frames_per_stream: options.max_inbound_priority_frames_per_stream,
            max_inbound_window_update_frames_per_data_frame_sent: options
                .max_inbound_window_update_frames_per_data_frame_sent,
            max_outbound_control_frames: options.max_outbound_control_frames,
            stream_reset_burst: options.stream_reset_burst,
            stream_reset_rate: options.stream_reset_rate,
        },
        keep_alive: options.keepalive.map(|keepalive| h2::KeepAlive {
            interval: keepalive.interval,
            interval_jitter: keepalive.interval_jitter,
            timeout: keepalive.timeout,
            connection_idle_interval: keepalive.connection_idle_interval,
        }),
        ..h2::Settings::default()
    }
}

stats::group! {
    /// What HTTP/2 counts (`http2.` for listeners, `cluster.NAME.http2.` for clusters), with Envoy's names.
    pub struct Http2Stats {
        counter goaway_sent,
        counter inbound_empty_frames_flood,
        counter inbound_priority_frames_flood,
        counter inbound_window_update_frames_flood,
        counter outbound_control_flood,
        counter keepalive_timeout,
        counter rx_messaging_error,
        counter rx_reset,
        counter tx_flush_timeout,
        counter tx_reset,
        gauge streams_active,
    }
}

/// Carries what has passed on one connection over into stats.
#[derive(Debug)]
pub(crate) struct Http2Meter {
    facts: Rc<h2::Facts>,
    stats: Rc<Http2Stats>,
    seen: Cell<[u64; 4]>,
    flooded: Cell<bool>,
}

impl Http2Meter {
    pub(crate) fn new(facts: &Rc<h2::Facts>, stats: &Rc<Http2Stats>) -> Self {
        Self {
            facts: facts.clone(),
            stats: stats.clone(),
            seen: Cell::default(),
            flooded: Cell::default(),
        }
    }

    /// Counts what is new. Streams that end well cost four loads.
    pub(crate) fn update(&self) {
        let facts = &self.facts;
        let now = [
            facts.resets_received.get(),
            facts.resets_sent.get(),
            facts.goaways_sent.get(),
            facts.protocol_errors_sent.get(),
        ];
        let before = self.seen.replace(now);
        if now != before {
            let stats = &self.stats;
            // A stat exists from its first use: what did not happen is not mentioned.
            for (index, counter) in [
                Http2Stats::rx_reset as fn(&Http2Stats) -> &::stats::Counter,
                Http2Stats::tx_reset,
                Http2Stats::goaway_sent,
                Http2Stats::rx_messaging_error,
            ]
            .into_iter()
            .enumerate()
            {
                if now[index] > before[index] {
                    counter(stats).add(now[index] - before[index]);
                }
            }
        }
        if let Some(flood) = facts.flood()
            && !self.flooded.replace(true)
        {
            match flood {
                h2::Flood::Empty => self.stats.inbound_empty_frames_flood().inc(),
                h2::Flood::Priority => self.stats.inbound_priority_frames_flood().inc(),
                h2::Flood::Control => self.stats.outbound_control_flood().inc(),
                // Envoy has no counter of its own for it; the GOAWAY is counted.
                h2::Flood::Reset => {}
                h2::Flood::WindowUpdate => self.stats.inbound_window_update_frames_flood().inc(),
            }
        }
    }
}

impl Drop for Http2Meter {
    fn drop(&mut self) {
        self.update();
    }
}
