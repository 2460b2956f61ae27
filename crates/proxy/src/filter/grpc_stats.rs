//! `envoy.filters.http.grpc_stats`: counts gRPC messages and statuses.

use bytes::Bytes;
use outrigger_http::{Headers, Refusal, ResponseHead};
use serde_json::json;

use super::{Filter, Interests, Step};
use crate::{
    http::Exchange,
    plan::http_filter::{GrpcStats, GrpcStatsMethods, RouteFilterConfig},
    worker::Worker,
};

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct GrpcStatsFilter {
    config: GrpcStats,
}

/// Messages of one gRPC call.
#[derive(Debug, Default)]
pub(crate) struct GrpcCounts {
    pub(crate) requests: Messages,
    pub(crate) responses: Messages,
    pub(crate) status: Option<u32>,
}

/// Counts length-prefixed messages in a stream of bytes.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    pub(crate) count: u64,
    prefix: [u8; 5],
    have: usize,
    left: u32,
}

impl Messages {
    fn take(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.left > 0 {
                let skip = (self.left as usize).min(data.len());
                self.left -= skip as u32;
                data = &data[skip..];
                continue;
            }
            let want = (5 - self.have).min(data.len());
            self.prefix[self.have..self.have + want].copy_from_slice(&data[..want]);
            self.have += want;
            data = &data[want..];
            if self.have == 5 {
                let [_, length @ ..] = self.prefix;
                self.left = u32::from_be_bytes(length);
                self.have = 0;
                self.count += 1;
            }
        }
    }
}

impl GrpcStatsFilter {
    pub(super) fn new(config: GrpcStats) -> GrpcStatsFilter {
        GrpcStatsFilter { config }
    }

    /// The prefix of a call's stats: with service and method where the configuration names them.
    fn prefix(&self, exchange: &Exchange<'_>) -> Option<String> {
        let cluster = exchange.upstream.cluster.as_ref()?.stat_name().clone();
        let (service, method) = exchange
            .request
            .path_only()
            .strip_prefix('/')?
            .split_once('/')?;
        let named = match &self.config.methods {
            GrpcStatsMethods::None => false,
            GrpcStatsMethods::All => true,
            GrpcStatsMethods::Listed(listed) => listed.iter().any(|(name, methods)| {
                **name == *service && methods.iter().any(|name| **name == *method)
            }),
        };
        Some(match named {
            true => format!("cluster.{cluster}.grpc.{service}.{method}."),
            false => format!("cluster.{cluster}.grpc."),
        })
    }
}

fn status(headers: &Headers) -> Option<u32> {
    headers.get_str("grpc-status")?.trim().parse().ok()
}

impl Filter for GrpcStatsFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
            .and(Interests::REQUEST_DATA)
            .and(Interests::RESPONSE)
            .and(Interests::RESPONSE_DATA)
            .and(Interests::COMPLETE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        if exchange.request.is_grpc() {
            exchange.filters.grpc = Some(GrpcCounts::default());
        }
        Step::Continue
    }

    fn request_data(&self, exchange: &mut Exchange<'_>, data: &mut Bytes) -> Result<(), Refusal> {
        if let Some(counts) = &mut exchange.filters.grpc {
            counts.requests.take(data);
        }
        Ok(())
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        if let Some(counts) = &mut exchange.filters.grpc {
            counts.status = status(&response.headers);
        }
    }

    fn response_data(&self, exchange: &mut Exchange<'_>, data: &mut Bytes) {
        if let Some(counts) = &mut exchange.filters.grpc {
            counts.responses.take(data);
        }
    }

    fn trailers(&self, exchange: &mut Exchange<'_>, trailers: &mut Headers) {
        if let Some(counts) = &mut exchange.filters.grpc {
            counts.status = status(trailers).or(counts.status);
        }
    }

    fn complete(&self, exchange: &mut Exchange<'_>, worker: &Worker) {
        let Some(counts) = exchange.filters.grpc.take() else {
            return;
        };
        if let Some(prefix) = self.prefix(exchange) {
            let scope = worker.stats.scope(&prefix);
            if let Some(status) = counts.status {
                scope.counter(itoa::Buffer::new().format(status)).inc();
                scope
                    .counter(if status == 0 { "success" } else { "failure" })
                    .inc();
                scope.counter("total").inc();
            }
            scope
                .counter("request_message_count")
                .add(counts.requests.count);
            scope
                .counter("response_message_count")
                .add(counts.responses.count);
        }
        if self.config.emit_filter_state {
            let value = json!({
                "request_message_count": counts.requests.count,
                "response_message_count": counts.responses.count,
            });
            exchange.set_state("envoy.filters.http.grpc_stats".into(), value);
        }
        exchange.filters.grpc = Some(counts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_whatever_the_pieces() {
        let bytes = [
            &[0, 0, 0, 0, 3, 1, 2, 3][..],
            &[0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 1, 9],
        ]
        .concat();
        for size in 1..bytes.len() {
            let mut messages = Messages::default();
            bytes.chunks(size).for_each(|piece| messages.take(piece));
            assert_eq!(messages.count, 3, "pieces of {size}");
        }
    }
}
