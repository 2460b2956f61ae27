//! The second half of an exchange: the response's head and body to the client, while the rest of
//! the request still goes up.

use std::{
    future::poll_fn,
    task::{Context as TaskContext, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use outrigger_http::{Error, Frame, Framing, ResponseHead, Version};

use super::{
    Exchange,
    failure::{self, Gone},
    forward::Forward,
    pass::Passed,
    pump::PumpError,
    respond, serve,
    timers::{Expired, Timer},
    upstream::Upstream,
};
use crate::{
    cluster::Outcome,
    plan::{HttpConnectionManager, lb::LbPolicy},
    router,
    worker::moment,
};

/// How the second half ended.
#[derive(Debug)]
enum End {
    Complete,
    Upstream(Error),
    Downstream(Gone),
    Expired(Expired),
}

impl Forward<'_, '_, '_, '_> {
    /// Sends the response.
    pub(super) async fn respond(
        &mut self,
        mut upstream: Upstream,
        mut head: ResponseHead,
        timer: &mut Timer,
    ) {
        self.deadlines.per_try = None;
        self.deadlines.touch();
        self.response_headers(&mut head);
        match self.cx.filters(self.exchange).take_bodies() {
            false => {
                let filters = self.cx.filters(self.exchange);
                filters.response(self.exchange, &mut head, self.cx.worker);
            }
            true => {
                let filtered = self.filter_response(&mut upstream, &mut head, timer);
                if let Err(why) = Box::pin(filtered).await {
                    return self.unheld(upstream, why).await;
                }
            }
        }
        respond::finish_head(self.cx, self.exchange, &mut head, true);
        let tunnel = head.framing == Framing::Tunnel;
        let stats = &self.cx.live.stats;
        if tunnel {
            // What is tunnelled may last; only the idle limit is left.
            self.deadlines.request = None;
            self.deadlines.stream = None;
            self.pump.start_tunnel(&mut self.kept);
            self.reader.start_tunnel();
            stats.downstream_cx_upgrades_total().inc();
            stats.downstream_cx_upgrades_active().inc();
        } else if self.pump.hold {
            // No upgrade: what the client sent behind its request is a request of its own.
            self.pump.hold = false;
            self.exchange.request.upgrade = false;
        }
        if !self.keeps && self.pump.is_caught_up(&self.kept) {
            // No attempt follows: a stream that lasts need not hold what it has sent.
            self.kept.stop();
        }
        self.exchange.progress.downstream_first_sent = Some(moment::now());
        if !self.kept.complete && !tunnel {
            stats.downstream_rq_response_before_rq_complete().inc();
        }
        let mut end = match self.writer.send_response(&head, head.framing) {
            Ok(()) => None,
            Err(error) => Some(End::Downstream(Gone::from(error))),
        };
        self.exchange.response = Some(head);
        if tunnel && end.is_none() && self.cx.live.plan.flush_access_log_on_tunnel {
            let log_type = "DownstreamTunnelSuccessfullyEstablished";
            serve::log_as(log_type, self.cx, self.exchange);
        }
        if end.is_none() {
            let mut waited = false;
            let bodies = poll_fn(|cx| {
                let end = self.poll_bodies(cx, &mut upstream, (tunnel, waited), timer);
                waited = true;
                end
            });
            end = Some(bodies.await);
        }
        let now = moment::now();
        self.exchange.progress.upstream_last_received = Some(now);
        if tunnel {
            stats.downstream_cx_upgrades_active().dec();
        }
        match end {
            Some(End::Complete) if tunnel => self.writer.close_after(),
            Some(End::Complete) => {
                let cluster = self.target.cluster.stats();
                let time = now.duration_since(self.exchange.progress.start);
                cluster.upstream_rq_time().record(time.as_millis() as u64);
                self.exchange.progress.end = Some(now);
                if self.pump.is_ended() {
                    upstream.release();
                } else {
                    // The server answered without waiting for all of the request.
                    upstream.cancel();
                }
            }
            Some(End::Upstream(error)) => {
                self.exchange.flags.add(failure::flag(&error));
                self.exchange.details = failure::details(
                    "upstream_reset_after_response_started",
                    &failure::reason(&error),
                    "",
                );
                self.target.cluster.stats().upstream_rq_rx_reset().inc();
                if let Some(host) = self.exchange.upstream.host.clone() {
                    self.target.cluster.report(&host, Outcome::Reset);
                }
                stats.rq_reset_after_downstream_response_started().inc();
                stats.downstream_rq_tx_reset().inc();
                respond::abort(self.writer);
            }
            Some(End::Downstream(gone)) => {
                gone.tell(self.exchange);
                stats.downstream_rq_rx_reset().inc();
                self.target.cluster.stats().upstream_rq_tx_reset().inc();
                upstream.cancel();
                respond::abort(self.writer);
            }
            Some(End::Expired(expired)) => {
                if expired == Expired::Flush && self.exchange.request.version == Version::Http2 {
                    self.cx.live.http2_stats.tx_flush_timeout().inc();
                }
                if expired == Expired::UpstreamStream {
                    let cluster = self.target.cluster.stats();
                    cluster.upstream_rq_max_duration_reached().inc();
                }
                failure::tell_expired(expired, self.exchange, stats);
                self.target.cluster.stats().upstream_rq_tx_reset().inc();
                upstream.cancel();
                stats.downstream_rq_tx_reset().inc();
                respond::abort(self.writer);
            }
            None => {}
        }
    }

    /// What the router adds to the response's head.
    fn response_headers(&mut self, head: &mut ResponseHead) {
        self.exchange.upstream.status = head.status;
        self.exchange.details = "via_upstream".into();
        let envoy = !self.cx.filters(self.exchange).router.suppress_envoy_headers;
        if envoy && let Some(time) = self.exchange.upstream.response_time {
            let mut millis = itoa::Buffer::new();
            let millis = millis.format(time.as_millis() as u64);
            head.headers.set("x-envoy-upstream-service-time", millis);
        }
        respond::tell_attempts(self.exchange, head);
        // A cookie is for those who go by the hash; a cluster that decides itself may hand it on to others.
        let policy = &self.target.cluster.plan.lb_policy;
        if let Some(action) = self.exchange.route.action()
            && !action.hash_policy.is_empty()
            && (policy.hashes() || *policy == LbPolicy::ClusterProvided)
        {
            router::hash::new_cookies(&action.hash_policy, self.exchange, |cookie| {
                head.headers.append("set-cookie", cookie);
            });
        }
        router::headers::response(self.exchange, &mut head.headers);
    }

    fn poll_bodies(
        &mut self,
        cx: &mut TaskContext<'_>,
        upstream: &mut Upstream,
        (tunnel, waited): (bool, bool),
        timer: &mut Timer,
    ) -> Poll<End> {
        match self.poll_pump(cx, upstream) {
            Poll::Ready(Err(PumpError::Downstream(error))) => {
                return Poll::Ready(End::Downstream(Gone::from(error)));
            }
            Poll::Ready(Err(PumpError::Upstream(_))) => self.pump.dead = true,
            _ => {}
        }
        if let Poll::Ready(end) = self.poll_response(cx, upstream, (tunnel, waited)) {
            return Poll::Ready(end);
        }
        if !tunnel && let Poll::Ready(gone) = failure::poll_gone(cx, self.reader, self.writer) {
            return Poll::Ready(End::Downstream(gone));
        }
        self.poll_deadlines(cx, timer).map(End::Expired)
    }

    /// Sends what filters add.
    fn send(&mut self, data: Bytes) -> Result<(), Error> {
        self.exchange.progress.sent += data.len() as u64;
        self.writer.send_data(data)
    }

    /// Moves the response's body.
    fn poll_response(
        &mut self,
        cx: &mut TaskContext<'_>,
        upstream: &mut Upstream,
        (tunnel, waited): (bool, bool),
    ) -> Poll<End> {
        let filters = self.cx.filters(self.exchange);
        let gone = |error| Poll::Ready(End::Downstream(Gone::from(error)));
        loop {
            if self.writer.is_end() {
                let flushed = self.writer.poll_flush(cx);
                if flushed.is_pending()
                    && let Some(limit) = flush_limit(&self.cx.live.plan, self.exchange)
                {
                    self.deadlines.flush(limit);
                }
                return match ready!(flushed) {
                    Ok(()) => Poll::Ready(End::Complete),
                    Err(error) => gone(error),
                };
            }
            if let Err(error) = ready!(self.writer.poll_ready(cx)) {
                return gone(error);
            }
            if self.cx.live.may_splice
                && self.held.is_none()
                && let Some(reader) = &mut upstream.http1()
                && filters.pass_response_data(self.exchange)
            {
                match ready!(self.pass.poll(cx, reader, self.writer)) {
                    Passed::Done => {}
                    Passed::Some(count) => {
                        self.deadlines.touch();
                        self.exchange.progress.body_received(waited);
                        self.exchange.progress.sent += count as u64;
                        continue;
                    }
                    Passed::Upstream(error) => return Poll::Ready(End::Upstream(error)),
                    Passed::Downstream(error) => return gone(error),
                }
            }
            let (frame, seen_by) = match &mut self.held {
                Some(held) => (Poll::Ready(held.frame().map(Ok)), held.seen_by),
                None => (upstream.poll_frame(cx), filters.len()),
            };
            let sent = match frame {
                Poll::Pending => {
                    if let Err(error) = ready!(self.writer.poll_flush(cx)) {
                        return gone(error);
                    }
                    return Poll::Pending;
                }
                Poll::Ready(Some(Ok(Frame::Data(mut data)))) => {
                    self.deadlines.touch();
                    if self.held.is_none() {
                        self.exchange.progress.body_received(waited);
                    }
                    filters.response_data_to(0..seen_by, self.exchange, &mut data);
                    if data.is_empty() {
                        continue;
                    }
                    self.exchange.progress.sent += data.len() as u64;
                    self.writer.send_data(data)
                }
                Poll::Ready(Some(Ok(Frame::Trailers(mut trailers)))) => {
                    let added = filters.response_end(self.exchange, Some(&mut trailers));
                    let end = filters.trailers(self.exchange, &mut trailers);
                    let sent = match added {
                        Some(added) => self.send(added),
                        None => Ok(()),
                    };
                    self.ended = true;
                    let sent = match end {
                        _ if sent.is_err() => sent,
                        None => self.writer.send_end(Some(&trailers)),
                        // The end of the stream itself comes next.
                        Some(end) => {
                            self.exchange.progress.sent += end.len() as u64;
                            self.writer.send_data(end)
                        }
                    };
                    self.exchange.trailers = Some(trailers);
                    sent
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(End::Upstream(error)),
                Poll::Ready(None) if tunnel => {
                    // The server has said all; a client that still talks talks to nobody.
                    let shut = ready!(self.writer.poll_shutdown(cx));
                    return match shut {
                        Ok(()) => Poll::Ready(End::Complete),
                        Err(error) => gone(error),
                    };
                }
                Poll::Ready(None) => {
                    let added = match std::mem::replace(&mut self.ended, true) {
                        false => filters.response_end(self.exchange, None),
                        true => None,
                    };
                    match added.map_or(Ok(()), |added| self.send(added)) {
                        Ok(()) => self.writer.send_end(None),
                        failed => failed,
                    }
                }
            };
            match sent {
                Ok(()) => {}
                // The upstream sent more or less than it had said.
                Err(Error::Length) => return Poll::Ready(End::Upstream(Error::Length)),
                Err(error) => return gone(error),
            }
        }
    }
}

/// How long a client may take for the rest of a response, where that is said apart from the idle limit.
pub(super) fn flush_limit(
    plan: &HttpConnectionManager,
    exchange: &Exchange<'_>,
) -> Option<Option<Duration>> {
    let action = exchange.route.action();
    let own = action.and_then(|action| action.flush_timeout);
    own.or(plan.stream_flush_timeout)
}
