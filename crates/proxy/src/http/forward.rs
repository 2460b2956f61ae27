//! One request through the proxy, from its head to its last byte: the linear function.
//!
//! Everything that can happen while we wait happens in one place: [`Forward::response_head`] and
//! [`Forward::bodies`] poll the client, the upstream and the timers of this request in one task.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::{Context as TaskContext, Poll},
    time::{Duration, Instant},
};

use outrigger_http::{BodyReader, BodyWriter, Error, ResponseHead, Version};
use tokio::time::Instant as TokioInstant;

use super::{
    Context, Exchange, Flags,
    exchange::Tried,
    failure::{self, Gone},
    hedge::Hedged,
    hold::Held,
    mirror,
    pass::Pass,
    pump::{Kept, Pump, PumpError},
    respond, serve,
    timers::{Deadlines, Expired, Timer},
    upstream::{self, Upstream},
};
use crate::{
    cluster::{Host, LbContext, Omit, Outcome, OverrideHost, UpstreamError},
    filter_state,
    io::Stream,
    plan::filter_state::ObjectKind,
    router::{
        self, Target,
        retry::{self, Answer, Retries, effective_status},
        rewrite,
        timeout::Timeouts,
    },
    transport::AutoName,
    worker::moment,
};

/// Why there is no response from this attempt.
#[derive(Debug)]
pub(super) enum AttemptError {
    /// No connection, or no host.
    NoConnection(UpstreamError),
    /// The connection or stream broke.
    Broken { error: Error, stale: bool },
    /// A limit of time.
    Expired(Expired),
    /// The client is gone; nobody waits for an answer.
    Downstream(Gone),
}

/// A request being forwarded.
pub(super) struct Forward<'a, 'c, 'r, 'w> {
    pub(super) cx: &'a Context<'a>,
    pub(super) exchange: &'a mut Exchange<'c>,
    pub(super) reader: &'a mut BodyReader<'r, Stream>,
    pub(super) writer: &'a mut BodyWriter<'w, Stream>,
    pub(super) target: Target,
    pub(super) retries: Retries,
    pub(super) timeouts: Timeouts,
    pub(super) kept: Kept,
    /// What was kept is needed even when there is a response: for copies, and for redirects that are followed here.
    pub(super) keeps: bool,
    pub(super) pump: Pump,
    pub(super) pass: Pass,
    /// The response's body, where filters have read it.
    pub(super) held: Option<Held>,
    /// Filters have been told of the end of the response's body.
    pub(super) ended: bool,
    pub(super) deadlines: Deadlines,
    /// Attempts that came to nothing without anybody's fault: on resting connections that turned out closed, and such
    /// that the upstream said it had not looked at.
    stale: u32,
    /// The last attempt began to send the request.
    sent: bool,
    /// The last attempt took too long.
    late: bool,
    /// An attempt that takes too long goes on beside the next.
    pub(super) hedge: bool,
    /// Attempts that do; an older one that has won while the last was waited for.
    pub(super) hedged: Vec<Hedged>,
    winner: Option<Hedged>,
    /// When the first attempt began.
    began: TokioInstant,
    /// The server name that the request chooses for its connection. Kept apart, since an attempt may rewrite the host.
    auto_name: Option<(Box<str>, bool)>,
}

/// Forwards the request and its response. Where the response is a redirect that is followed here, the exchange holds the
/// new request, and what was kept of its body comes back for it.
pub(super) async fn forward(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    reader: &mut BodyReader<'_, Stream>,
    writer: &mut BodyWriter<'_, Stream>,
    timer: &mut Timer,
    target: Target,
    body: Option<Kept>,
) -> Option<Kept> {
    let retries = Retries::new(exchange);
    let timeouts = Timeouts::new(
        &cx.live.plan,
        exchange,
        retries.policy().map(|policy| &**policy),
        &cx.filters(exchange).router,
    );
    let hedge = retry::hedges(exchange);
    let mirrors = mirror::chosen(exchange, cx.worker);
    let limit = exchange.buffer_limit();
    let follows = exchange
        .route
        .action()
        .is_some_and(|action| action.internal_redirect.is_some());
    // Over HTTP/2 an upstream may say that it did not look at a request; then even a POST is sent again.
    let keep = follows
        || retries.is_possible()
        || !mirrors.is_empty()
        || retry::is_repeatable(exchange)
        || target
            .cluster
            .speaks_http2(exchange.request.version == Version::Http2);
    let now = TokioInstant::from_std(moment::now());
    let receive = cx.live.plan.request_timeout;
    let mut deadlines = Deadlines::new(timeouts.stream, timeouts.idle, receive, now);
    if let Some(interval) = cx.live.plan.access_log_flush_interval {
        deadlines.log_each(interval, now);
    }
    let mut kept = body.unwrap_or_else(|| Kept::new(keep && !exchange.request.upgrade, limit));
    if !kept.complete {
        // A filter has read its beginning.
        kept.limit_to(limit);
    }
    let keeps = follows || !mirrors.is_empty();
    let mut forward = Forward {
        cx,
        exchange,
        reader,
        writer,
        target,
        retries,
        timeouts,
        kept,
        keeps,
        pump: Pump::default(),
        pass: Pass::default(),
        held: None,
        ended: false,
        deadlines,
        stale: 0,
        sent: false,
        late: false,
        hedge,
        hedged: Vec::new(),
        winner: None,
        auto_name: None,
        began: now,
    };
    forward.prepare_request();
    let plan = &forward.target.cluster.plan;
    forward.auto_name = match upstream::auto_name(plan, &forward.exchange.request) {
        Some(auto) => Some((auto.name.into(), auto.checked)),
        None => {
            let named = forward.exchange.well_known(ObjectKind::UpstreamServerName);
            named.and_then(|name| Some((name.as_str()?.into(), false)))
        }
    };
    let redirected = forward.run(timer).await;
    if !mirrors.is_empty() {
        mirror::send(mirrors, &forward.kept, forward.exchange, cx.worker);
    }
    redirected.then_some(forward.kept)
}

impl Forward<'_, '_, '_, '_> {
    /// The request as the upstream gets it.
    fn prepare_request(&mut self) {
        let envoy = !self.cx.filters(self.exchange).router.suppress_envoy_headers;
        // Before the route's operations, which may see it and take it off.
        self.tell_timeout(Duration::ZERO);
        router::headers::request(self.exchange);
        rewrite::request(self.exchange, envoy);
        let decorator = self
            .exchange
            .route
            .route()
            .and_then(|route| route.decorator.as_ref());
        if let Some(decorator) = decorator.filter(|decorator| decorator.propagate && envoy)
            && self.exchange.traced
        {
            let operation = decorator.operation.clone();
            self.exchange
                .request
                .headers
                .set("x-envoy-decorator-operation", operation.as_bytes());
        }
        if let Some(action) = self.exchange.route.action()
            && !action.hash_policy.is_empty()
        {
            let hash = router::hash::with_new_cookies(&action.hash_policy, self.exchange);
            self.target.hash = hash;
        }
    }

    /// Makes attempts until there is a response; true where it is a redirect to be followed.
    async fn run(&mut self, timer: &mut Timer) -> bool {
        // Those before were tried for a request whose redirect was followed.
        let before = self.exchange.upstream.tried.len();
        let mut permit = None;
        loop {
            let mut result = self.attempt(before, timer).await;
            self.late = matches!(
                result,
                Err(AttemptError::Expired(Expired::PerTry | Expired::PerTryIdle))
            );
            let stats = self.target.cluster.stats().clone();
            let mut answer = match &result {
                Ok((_, head)) => self.retries.response(head),
                Err(AttemptError::Broken { stale: true, .. })
                    if self.stale < REPLAYS
                        && retry::is_repeatable(self.exchange)
                        && self.kept.is_whole() =>
                {
                    // The upstream closed a resting connection in the moment we used it. Nobody
                    // has answered, nobody is harmed by asking again, and the client need not
                    // know.
                    self.stale += 1;
                    continue;
                }
                Err(error) => match failure::kind(error) {
                    // What goes on beside is repeated whatever the policy says about timeouts.
                    Some(_) if self.late && !self.hedged.is_empty() => self.retries.again(),
                    Some(kind) => self.retries.failure(kind),
                    None => Answer::No,
                },
            };
            drop(permit.take());
            let unprocessed = matches!(
                result,
                Err(AttemptError::Broken {
                    error: Error::Unprocessed,
                    ..
                })
            );
            if unprocessed && answer == Answer::No && self.stale < REPLAYS && self.kept.is_whole() {
                // The upstream did not look at it (GOAWAY, REFUSED_STREAM): no policy is needed to say it again.
                self.stale += 1;
                continue;
            }
            if answer == Answer::Yes
                && result.is_err()
                && self.sent
                && !unprocessed
                && !retry::is_repeatable(self.exchange)
                && !retry::repeats_unsafe(self.exchange, self.cx.worker)
            {
                // The server may be at work on it, or done.
                answer = Answer::No;
                stats.upstream_rq_retry_unsafe().inc();
            }
            if answer == Answer::Yes && !self.kept.is_whole() {
                answer = Answer::No;
                stats.retry_or_shadow_abandoned().inc();
            }
            if answer == Answer::Yes {
                permit = self.target.cluster.retry(self.target.priority);
                if permit.is_none() {
                    answer = Answer::No;
                }
            }
            if answer == Answer::Yes || result.is_err() {
                // What follows is no part of this attempt.
                self.deadlines.upstream_stream = None;
            }
            if answer != Answer::Yes
                && !self.hedged.is_empty()
                && let Err(error) = &result
                && failure::kind(error).is_some()
            {
                match self.last_hope(timer).await {
                    Some(Ok((older, head))) => {
                        answer = Answer::No;
                        result = Ok((self.take_over(older), head));
                    }
                    Some(Err(error)) => {
                        answer = Answer::No;
                        result = Err(error);
                    }
                    None => {}
                }
            }
            match answer {
                Answer::Yes => {
                    self.retries.begin();
                    stats.upstream_rq_retry().inc();
                    let response = result.as_ref().ok().map(|(_, head)| head);
                    let (pause, limited) = self.retries.pause(response, &self.cx.worker.random);
                    match limited {
                        true => stats.upstream_rq_retry_backoff_ratelimited().inc(),
                        false => stats.upstream_rq_retry_backoff_exponential().inc(),
                    }
                    if let Ok((upstream, head)) = result {
                        self.target.cluster.count_repeated(head.status);
                        if head.framing.is_none() {
                            upstream.release();
                        } else {
                            upstream.cancel();
                        }
                    }
                    match self.pause(pause, timer).await {
                        Ok(()) => continue,
                        Err(error) => {
                            self.fail(error).await;
                            return false;
                        }
                    }
                }
                Answer::Exhausted => {
                    stats.upstream_rq_retry_limit_exceeded().inc();
                    self.exchange
                        .flags
                        .add(Flags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
                }
                Answer::No => {}
            }
            match result {
                Ok((upstream, head)) => {
                    if self.retries.made > 0 && answer == Answer::No {
                        stats.upstream_rq_retry_success().inc();
                    }
                    if self.follow(&head) {
                        match head.framing.is_none() {
                            true => upstream.release(),
                            false => upstream.cancel(),
                        }
                        return true;
                    }
                    let cluster = &self.target.cluster;
                    cluster.count_response(head.status, self.exchange.internal);
                    self.respond(upstream, head, timer).await;
                }
                Err(error) => self.fail(error).await,
            }
            return false;
        }
    }

    /// One attempt, up to the head of its response. The hosts that were tried begin behind so many.
    async fn attempt(
        &mut self,
        before: usize,
        timer: &mut Timer,
    ) -> Result<(Upstream, ResponseHead), AttemptError> {
        self.exchange.upstream.attempts += 1;
        self.sent = false;
        let now = match self.exchange.upstream.attempts {
            1 => self.began,
            _ => TokioInstant::from_std(moment::now()),
        };
        self.deadlines.per_try = self.timeouts.per_try.map(|limit| now + limit);
        self.deadlines.upstream_stream = None;
        self.deadlines
            .start_per_try_idle(self.timeouts.per_try_idle, now);
        if self.reader.is_end() && self.deadlines.request.is_none() {
            self.start_request_timeout(now);
        }
        let cluster = self.target.cluster.clone();
        let version = self.exchange.request.version;
        let alpn = {
            let spoken = match cluster.speaks_http2(version == Version::Http2) {
                true => Version::Http2,
                false => version.min(Version::Http11),
            };
            self.cx.filters(self.exchange).alpn(&cluster.plan, spoken)
        };
        let protocols = self.exchange.well_known(ObjectKind::ApplicationProtocols);
        let protocols = protocols.and_then(filter_state::protocols);
        let metadata_match = self.target.metadata_match.clone();
        let override_host = self.exchange.override_host.clone();
        // Predicates are about retries; a first attempt goes where the policy says.
        let policy = self.retries.policy().filter(|_| self.retries.made > 0);
        let tried = policy.map_or_else(Tried::new, |_| {
            self.exchange.upstream.tried[before..].into()
        });
        let avoid = policy.is_some_and(|policy| policy.avoid_previous_hosts);
        let omit =
            policy.filter(|policy| policy.omit_canary_hosts || policy.omit_host_metadata.is_some());
        if self.exchange.upstream.attempts == 1 {
            if cluster.is_maintained() {
                return Err(AttemptError::NoConnection(UpstreamError::MaintenanceMode));
            }
            if cluster.drops() {
                return Err(AttemptError::NoConnection(UpstreamError::DropOverload));
            }
        }
        let preferred = router::preferred::hosts(&cluster, self.exchange);
        let context = LbContext {
            hash: self.target.hash,
            original_dst: router::preferred::original_dst(&cluster, self.exchange),
            avoid: if avoid { &tried } else { &[] },
            avoid_priorities: policy.map_or(0, |policy| policy.priorities_tried(&tried)),
            omit: omit.map(|policy| &**policy as &dyn Omit),
            avoid_attempts: match policy {
                Some(policy) if avoid || omit.is_some() => policy.host_selection_max_attempts,
                _ => 0,
            },
            priority: self.target.priority,
            downstream_connection: self.exchange.connection.id,
            downstream: Some(self.exchange.connection),
            source: self.exchange.source,
            alpn: alpn.or(protocols.as_deref()),
            auto_name: self.auto_name.as_ref().map(|(name, checked)| AutoName {
                name,
                checked: *checked,
            }),
            metadata_match: metadata_match.as_deref(),
            // A retry goes where the others go.
            override_host: override_host
                .as_ref()
                .filter(|_| self.exchange.upstream.attempts == 1)
                .map(|(address, strict)| OverrideHost {
                    address,
                    strict: *strict,
                }),
            fresh: self.stale > 0,
            preferred: (&preferred, self.exchange.upstream.attempts as usize - 1),
        };
        let host = cluster
            .choose(&context)
            .map_err(AttemptError::NoConnection)?;
        self.exchange.upstream.host = Some(host.clone());
        self.exchange.upstream.tried.push(host.clone());
        // A connection that is there at once is not waited for, which needs no clock.
        let mut waits = None;
        let mut upstream = {
            let terminate = self.exchange.terminates_connect();
            let mut acquired = pin!(async {
                match terminate {
                    Some(proxy) => {
                        Box::pin(Upstream::connect(&cluster, &host, &context, proxy)).await
                    }
                    None => Upstream::acquire(&cluster, &host, &context, version).await,
                }
            });
            let (reader, writer, deadlines) =
                (&mut *self.reader, &mut *self.writer, &mut self.deadlines);
            poll_fn(|cx| {
                if let Poll::Ready(result) = acquired.as_mut().poll(cx) {
                    return Poll::Ready(result.map_err(AttemptError::NoConnection));
                }
                if let Poll::Ready(gone) = failure::poll_gone(cx, reader, writer) {
                    return Poll::Ready(Err(AttemptError::Downstream(gone)));
                }
                waits.get_or_insert_with(Instant::now);
                // What the choice of the host still reads cannot be logged now.
                deadlines
                    .poll(cx, timer, || {})
                    .map(|at| Err(AttemptError::Expired(at)))
            })
            .await
        }?;
        self.connected(&mut upstream);
        self.exchange.upstream.pool_ready = Some(waits.map_or(Duration::ZERO, |w| w.elapsed()));
        let id = upstream.established.id;
        self.exchange.upstream.connections.push(id);
        self.attempt_headers(&host);
        // Where nothing was waited for, hardly any time has passed.
        let sent = waits.map_or(now.into_std(), |_| moment::now());
        let longest = self.target.cluster.plan.http.max_stream_duration;
        self.deadlines.upstream_stream = longest.map(|limit| TokioInstant::from(sent) + limit);
        self.exchange
            .progress
            .upstream_first_sent
            .get_or_insert(sent);
        let framing = self.exchange.request.framing;
        upstream
            .send_head(&self.exchange.request, framing)
            .map_err(|error| AttemptError::Broken {
                error,
                stale: false,
            })?;
        self.sent = true;
        self.pump = Pump::new(self.exchange.request.upgrade);
        let result = self.response_head(&mut upstream, timer).await;
        match &result {
            Ok(head) => {
                let host = self.winner.as_ref().map_or(&host, |older| &older.host);
                cluster.report(host, Outcome::Status(effective_status(head)));
                cluster.answered(host, head.status, || {
                    head.headers.contains("x-envoy-degraded")
                });
                if cluster.plan.health_check.is_some()
                    && head.headers.contains("x-envoy-immediate-health-check-fail")
                {
                    cluster.immediate_health_check_fail(host);
                }
                let received = moment::now();
                let progress = &mut self.exchange.progress;
                progress.upstream_first_received = Some(received);
                let sent = progress
                    .upstream_last_sent
                    .filter(|at| *at > sent)
                    .unwrap_or(sent);
                self.exchange.upstream.response_time = Some(received.duration_since(sent));
            }
            Err(AttemptError::Broken { stale: false, .. }) => {
                cluster.stats().upstream_rq_rx_reset().inc();
                cluster.report(&host, Outcome::Reset);
            }
            // A client that is slow says nothing about the host.
            Err(AttemptError::Expired(Expired::Receive | Expired::Idle)) => {
                cluster.stats().upstream_rq_cancelled().inc();
            }
            Err(AttemptError::Expired(Expired::UpstreamStream)) => {
                cluster.stats().upstream_rq_max_duration_reached().inc();
            }
            Err(AttemptError::Expired(expired)) => {
                cluster.stats().upstream_rq_timeout().inc();
                match expired {
                    Expired::PerTry => cluster.stats().upstream_rq_per_try_timeout().inc(),
                    Expired::PerTryIdle => cluster.stats().upstream_rq_per_try_idle_timeout().inc(),
                    _ => {}
                }
                cluster.report(&host, Outcome::Timeout);
            }
            Err(AttemptError::Downstream(_)) => {
                cluster.stats().upstream_rq_cancelled().inc();
            }
            _ => {}
        }
        match result {
            Ok(head) => match self.winner.take() {
                None => Ok((upstream, head)),
                Some(older) => {
                    upstream.cancel();
                    Ok((self.take_over(older), head))
                }
            },
            Err(AttemptError::Expired(Expired::PerTry)) if self.hedges() => {
                self.hedged.push(Hedged { upstream, host });
                Err(AttemptError::Expired(Expired::PerTry))
            }
            Err(error) => {
                upstream.cancel();
                Err(error)
            }
        }
    }

    /// Notes which connection carries the attempt.
    pub(super) fn connected(&mut self, upstream: &mut Upstream) {
        let info = &mut self.exchange.upstream;
        info.local = upstream.established.local;
        info.established = Some(upstream.established);
        info.tls = upstream.session();
        info.protocol = upstream.version();
    }

    /// Tells the host how long it is waited for, when so much time has passed.
    fn tell_timeout(&mut self, passed: Duration) {
        let envoy = !self.cx.filters(self.exchange).router.suppress_envoy_headers;
        let Some(expected) = self.timeouts.expected(passed) else {
            return;
        };
        let headers = &mut self.exchange.request.headers;
        self.timeouts.tell_grpc(headers, expected);
        if envoy {
            let mut text = itoa::Buffer::new();
            let text = text.format(expected);
            self.exchange
                .request
                .headers
                .set("x-envoy-expected-rq-timeout-ms", text);
        }
    }

    /// What changes from attempt to attempt.
    fn attempt_headers(&mut self, host: &Host) {
        let live = self.cx.live;
        if let (Some(tracer), Some(tracing)) = (&live.tracer, &live.plan.tracing) {
            tracer.inject(tracing, self.exchange, self.cx.worker);
        }
        if self.exchange.upstream.attempts > 1 {
            // Time counts from when the request was complete, as its limit does.
            let since = self.exchange.progress.request_received;
            let passed = since.map(|since| moment::now().saturating_duration_since(since));
            self.tell_timeout(passed.unwrap_or_default());
        }
        let count = self
            .exchange
            .route
            .get()
            .is_some_and(|(host, _)| host.include_request_attempt_count);
        if count {
            let attempts = self.exchange.upstream.attempts - self.stale;
            let mut text = itoa::Buffer::new();
            let text = text.format(attempts);
            self.exchange
                .request
                .headers
                .set("x-envoy-attempt-count", text);
        }
        let told = self
            .exchange
            .route
            .get()
            .is_some_and(|(host, _)| host.include_is_timeout_retry_header);
        if told && self.retries.made > 0 {
            let late = if self.late { "true" } else { "false" };
            self.exchange
                .request
                .headers
                .set("x-envoy-is-timeout-retry", late);
        }
        if self.target.auto_host && !host.hostname.is_empty() {
            let tell = self
                .exchange
                .route
                .action()
                .is_some_and(|a| a.append_x_forwarded_host);
            // A further attempt finds the name of the host before it, not what the client asked for.
            let first = self.exchange.upstream.attempts == 1;
            let envoy = first && !self.cx.filters(self.exchange).router.suppress_envoy_headers;
            rewrite::set_host(self.exchange, &host.hostname, tell && first, envoy);
        }
    }

    /// The request's own limit begins when all of it has arrived.
    fn start_request_timeout(&mut self, now: TokioInstant) {
        self.deadlines.receive = None;
        self.deadlines.request = self.timeouts.request.map(|limit| now + limit);
    }

    /// Sends the request and waits for the head of its response.
    async fn response_head(
        &mut self,
        upstream: &mut Upstream,
        timer: &mut Timer,
    ) -> Result<ResponseHead, AttemptError> {
        poll_fn(|cx| self.poll_response_head(cx, upstream, timer)).await
    }

    fn poll_response_head(
        &mut self,
        cx: &mut TaskContext<'_>,
        upstream: &mut Upstream,
        timer: &mut Timer,
    ) -> Poll<Result<ResponseHead, AttemptError>> {
        let mut broken = None;
        match self.poll_pump(cx, upstream) {
            Poll::Ready(Err(PumpError::Downstream(error))) => {
                return Poll::Ready(Err(AttemptError::Downstream(Gone::from(error))));
            }
            // The upstream may have answered before it stopped to listen.
            Poll::Ready(Err(PumpError::Upstream(error))) => {
                self.pump.dead = true;
                broken = Some(error);
            }
            _ => {}
        }
        if self.kept.complete && self.deadlines.request.is_none() && self.timeouts.request.is_some()
        {
            self.start_request_timeout(TokioInstant::now());
        }
        loop {
            match upstream.poll_head(cx, self.exchange.request.upgrade) {
                Poll::Ready(Ok(head)) if head.is_informational() => {
                    self.deadlines.touch();
                    // Our own 100 has been sent where we do not leave that to the upstream.
                    if head.status != 100 || self.cx.live.plan.proxy_100_continue {
                        let _ = self.writer.send_informational(head.status, &head.headers);
                        let _ = self.writer.poll_flush(cx);
                    }
                }
                Poll::Ready(Ok(head)) => return Poll::Ready(Ok(head)),
                Poll::Ready(Err(error)) => {
                    let error = match (broken, error) {
                        (Some(broken), Error::Closed) => broken,
                        (_, error) => error,
                    };
                    return Poll::Ready(Err(self.broken(error, upstream)));
                }
                Poll::Pending => break,
            }
        }
        if let Some(error) = broken {
            return Poll::Ready(Err(self.broken(error, upstream)));
        }
        if !self.hedged.is_empty()
            && let Poll::Ready((older, head)) = self.poll_hedged(cx)
        {
            self.winner = Some(older);
            return Poll::Ready(Ok(head));
        }
        if let Poll::Ready(gone) = failure::poll_gone(cx, self.reader, self.writer) {
            return Poll::Ready(Err(AttemptError::Downstream(gone)));
        }
        self.poll_deadlines(cx, timer)
            .map(|expired| Err(AttemptError::Expired(expired)))
    }

    /// Waits for the first deadline; lines about a request that goes on are written meanwhile.
    pub(super) fn poll_deadlines(
        &mut self,
        cx: &mut TaskContext<'_>,
        timer: &mut Timer,
    ) -> Poll<Expired> {
        let log = || serve::log_as("DownstreamPeriodic", self.cx, self.exchange);
        self.deadlines.poll(cx, timer, log)
    }

    fn broken(&self, error: Error, upstream: &Upstream) -> AttemptError {
        let stale = upstream.reused
            && !upstream.has_response_bytes()
            && matches!(error, Error::Closed | Error::Io(_) | Error::Unresponsive);
        AttemptError::Broken { error, stale }
    }

    /// Moves the request's body.
    pub(super) fn poll_pump(
        &mut self,
        cx: &mut TaskContext<'_>,
        upstream: &mut Upstream,
    ) -> Poll<Result<(), PumpError>> {
        let before = self.exchange.progress.received;
        let filters = self.cx.filters(self.exchange);
        let moved = self.pump.poll(
            cx,
            self.reader,
            upstream,
            &mut self.kept,
            self.exchange,
            filters,
        );
        if self.exchange.progress.received != before {
            self.deadlines.touch();
        }
        if self.kept.complete {
            self.deadlines.receive = None;
        }
        moved
    }

    /// Waits before a retry.
    async fn pause(&mut self, pause: Duration, timer: &mut Timer) -> Result<(), AttemptError> {
        self.deadlines.per_try = None;
        self.deadlines.per_try_idle = None;
        let mut sleep = pin!(tokio::time::sleep(pause));
        poll_fn(|cx| {
            if sleep.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            if let Poll::Ready(gone) = failure::poll_gone(cx, self.reader, self.writer) {
                return Poll::Ready(Err(AttemptError::Downstream(gone)));
            }
            self.poll_deadlines(cx, timer)
                .map(|at| Err(AttemptError::Expired(at)))
        })
        .await
    }

    /// Answers for an upstream that did not.
    async fn fail(&mut self, error: AttemptError) {
        let is_routers = failure::is_routers(&error);
        match failure::reply(error, self.exchange, self.kept.complete, self.cx.live) {
            Some(reply) => {
                if is_routers {
                    let cluster = &self.target.cluster;
                    cluster.count_response(reply.status, self.exchange.internal);
                }
                respond::reply(self.cx, self.exchange, self.reader, self.writer, reply).await;
            }
            None => respond::abort(self.writer),
        }
    }
}

/// Times that a request is sent again beside what its retry policy says, each on a new connection or one that works.
const REPLAYS: u32 = 3;
