//! HTTP filters: what runs on a request between the connection manager and the router.
//!
//! A filter is asked about each phase that it has an interest in, in order on the way up and in
//! reverse on the way down; a filter without interest in bodies costs nothing on bodies. What it
//! wants to remember about a request stands in [`FilterData`]; what it remembers about all of
//! them stands in itself (one instance a worker and connection manager).

mod buffer;
mod cors;
pub(crate) mod ext_authz;
mod fault;
mod grpc_stats;
mod grpc_web;
mod header_mutation;
mod health_check;
mod istio_stats;
mod jwt_authn;
mod limited;
mod local_rate_limit;
mod lua;
mod metadata;
mod original_src;
mod peer_metadata;
pub(crate) mod rate_limit;
pub(crate) mod rbac;
mod set_filter_state;
mod stateful_session;

pub(crate) use istio_stats::{IstioTcpStats, TcpReport};

use std::{fmt, ops::Range, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use outrigger_http::{Headers, Refusal, ResponseHead, Version};

use crate::{
    http::{Exchange, LocalReply, SideCallError, SideResponse},
    plan::{
        Cluster, HttpFilter,
        filter_config::HeaderToMetadata,
        http_filter::{
            AlpnFilter, AlpnProtocol, HttpFilterConfig, RouteFilterConfig, RouterFilter,
        },
    },
    worker::Worker,
};

pub(crate) use cors::CorsData;
pub(crate) use fault::ActiveFault;
pub(crate) use grpc_stats::GrpcCounts;
pub(crate) use grpc_web::GrpcWeb;
pub(crate) use health_check::HealthCheckRequest;
pub(crate) use local_rate_limit::RateLimitState;
pub(crate) use peer_metadata::{DOWNSTREAM_PEER, UPSTREAM_PEER, from_struct, to_struct, workload};
pub(crate) use rate_limit::RateLimits;
pub(crate) use stateful_session::Session;

/// What a filter decides about a request.
pub(crate) enum Step {
    /// It goes on.
    Continue,
    /// It waits; then [`Filter::resumed`] is asked.
    Wait(Duration),
    /// It waits until all of it is here, up to so many bytes.
    Buffer(u32),
    /// It waits for somebody else; then [`Filter::answered`] is asked. In a box, since the few filters that do this
    /// wait for another process anyway.
    Ask(Pending),
    /// It waits for the body, up to so many bytes; then [`Filter::buffered`] is asked.
    Body {
        /// Bytes.
        limit: u32,
        /// A longer body is shown in part; else it is refused.
        partial: bool,
    },
    /// It ends here.
    Reply(LocalReply),
}

/// What a filter waits for. Dropped when the client goes away.
pub(crate) type Pending = Pin<Box<dyn Future<Output = Answer>>>;

/// What has come.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Whatever it was, it is where it is looked for.
    Ready,
    /// What a service has decided.
    Authorization(Box<ext_authz::Verdict>),
    /// What a rate limit service has said; nothing where it could not be asked.
    RateLimit(Option<Box<rate_limit::Verdict>>),
    /// What a cluster has said to a script.
    Call(Box<Result<SideResponse, SideCallError>>),
}

/// Where a filter stands with a request.
#[derive(Debug)]
pub(crate) enum Stage {
    /// It has not seen it.
    Head,
    /// It has waited.
    Resumed,
    /// It has asked.
    Answered(Answer),
    /// It has waited for the body.
    Buffered(Bytes, bool),
}

/// The phases that a filter wants to see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Interests(u8);

impl Interests {
    pub(crate) const REQUEST: Interests = Interests(1);
    pub(crate) const REQUEST_DATA: Interests = Interests(2);
    pub(crate) const RESPONSE: Interests = Interests(4);
    pub(crate) const RESPONSE_DATA: Interests = Interests(8);
    pub(crate) const COMPLETE: Interests = Interests(16);
    /// Whole bodies and trailers, to change them; waits on the way down as well.
    pub(crate) const BODIES: Interests = Interests(32);

    /// Both.
    pub(crate) const fn and(self, other: Interests) -> Interests {
        Interests(self.0 | other.0)
    }

    fn has(self, other: Interests) -> bool {
        self.0 & other.0 != 0
    }
}

/// One HTTP filter.
pub(crate) trait Filter: fmt::Debug {
    /// Which of the methods below do anything.
    fn interests(&self) -> Interests;

    /// The request's head, with its route.
    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        let _ = (exchange, config, worker);
        Step::Continue
    }

    /// After a [`Step::Wait`].
    fn resumed(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        let _ = (exchange, config, worker);
        Step::Continue
    }

    /// After a [`Step::Body`], with what there is of it, and whether that is all.
    fn buffered(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
        body: Bytes,
        complete: bool,
    ) -> Step {
        let _ = (exchange, config, worker, body, complete);
        Step::Continue
    }

    /// After a [`Step::Ask`].
    fn answered(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
        answer: Answer,
    ) -> Step {
        let _ = (exchange, config, worker, answer);
        Step::Continue
    }

    /// A piece of the request's body, on its way up.
    ///
    /// # Errors
    /// The body is none that may go on.
    fn request_data(&self, exchange: &mut Exchange<'_>, data: &mut Bytes) -> Result<(), Refusal> {
        let _ = (exchange, data);
        Ok(())
    }

    /// All of the request's body has gone up. Gives what the filter adds to it; `trailers` follow.
    fn request_end(
        &self,
        exchange: &mut Exchange<'_>,
        trailers: Option<&mut Headers>,
    ) -> Option<Bytes> {
        let _ = (exchange, trailers);
        None
    }

    /// [`Filter::response`] of a filter with [`Interests::BODIES`]: it may want the body, or ask somebody else.
    fn response_step(
        &self,
        exchange: &mut Exchange<'_>,
        response: &mut ResponseHead,
        config: Option<&RouteFilterConfig>,
        at: Stage,
        worker: &Worker,
    ) -> Step {
        let _ = (config, at);
        self.response(exchange, response, worker);
        Step::Continue
    }

    /// The response's head, ours or the upstream's, before it goes to the client.
    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, worker: &Worker) {
        let _ = (exchange, response, worker);
    }

    /// A piece of the response's body, on its way down.
    fn response_data(&self, exchange: &mut Exchange<'_>, data: &mut Bytes) {
        let _ = (exchange, data);
    }

    /// All of the response's body has gone down. Gives what the filter adds to it; `trailers` follow.
    fn response_end(
        &self,
        exchange: &mut Exchange<'_>,
        trailers: Option<&mut Headers>,
    ) -> Option<Bytes> {
        let _ = (exchange, trailers);
        None
    }

    /// The response's trailers.
    fn trailers(&self, exchange: &mut Exchange<'_>, trailers: &mut Headers) {
        let _ = (exchange, trailers);
    }

    /// What goes to the client as the end of the body in place of the response's trailers.
    fn end(&self, exchange: &mut Exchange<'_>, trailers: &Headers) -> Option<Bytes> {
        let _ = (exchange, trailers);
        None
    }

    /// The request is over; its log line is written next.
    fn complete(&self, exchange: &mut Exchange<'_>, worker: &Worker) {
        let _ = (exchange, worker);
    }
}

/// A body that is in the proxy's hands while a filter with [`Interests::BODIES`] looks at its message.
#[derive(Debug, Default)]
pub(crate) struct InHand {
    /// All of it.
    pub(crate) body: Bytes,
    /// A filter has put another in its place.
    pub(crate) changed: bool,
    pub(crate) trailers: Option<Headers>,
}

/// What filters remember about one request.
#[derive(Debug, Default)]
pub(crate) struct FilterData {
    pub(crate) cors: Option<CorsData>,
    pub(crate) fault: Option<ActiveFault>,
    pub(crate) grpc: Option<GrpcCounts>,
    pub(crate) grpc_web: Option<GrpcWeb>,
    /// The client sent its metadata, so it wants ours.
    pub(crate) peer_asked: bool,
    pub(crate) header_to_metadata: Option<Arc<HeaderToMetadata>>,
    pub(crate) rate_limit: Option<RateLimitState>,
    /// Of filters that ask a rate limit service. In a box, since few do.
    pub(crate) rate_limits: Option<Box<RateLimits>>,
    pub(crate) session: Option<Session>,
    /// What an authorization service wants on the response.
    pub(crate) authorized: Option<Vec<ext_authz::Mutation>>,
    /// It is a check of this proxy's health.
    pub(crate) health_check: Option<HealthCheckRequest>,
    /// Scripts that wait.
    pub(crate) lua: lua::Runs,
    /// The body of the message that a filter looks at, lent to it.
    pub(crate) in_hand: Option<Box<InHand>>,
    /// Filters that the route has switched off, as bits of their position.
    off: u64,
}

impl FilterData {
    /// Forgets all but what is due at the request's end: it goes through the filters again.
    pub(crate) fn begin_again(&mut self) {
        let due = self.rate_limits.take().and_then(|kept| kept.due());
        *self = Self {
            rate_limits: due.map(Box::new),
            ..Self::default()
        };
    }
}

/// The filters of a connection manager on one worker.
#[derive(Debug)]
pub(crate) struct Filters {
    filters: Vec<Live>,
    interests: Interests,
    /// The last filter's configuration.
    pub(crate) router: RouterFilter,
    /// `istio.alpn`.
    alpn: Option<Arc<AlpnFilter>>,
}

#[derive(Debug)]
struct Live {
    name: Arc<str>,
    disabled: bool,
    interests: Interests,
    filter: Box<dyn Filter>,
}

impl Filters {
    /// Makes the filters live.
    pub(crate) fn new(plans: &[HttpFilter], stat_prefix: &str, worker: &Worker) -> Filters {
        let mut filters = Vec::new();
        let mut router = RouterFilter::default();
        let mut alpn = None;
        for filter in plans {
            let live: Box<dyn Filter> = match &filter.config {
                HttpFilterConfig::Router(config) => {
                    router = config.clone();
                    continue;
                }
                HttpFilterConfig::Fault(fault) => {
                    Box::new(fault::FaultFilter::new(fault.clone(), stat_prefix, worker))
                }
                HttpFilterConfig::Cors => {
                    Box::new(cors::CorsFilter::new(&filter.name, stat_prefix, worker))
                }
                HttpFilterConfig::GrpcStats(config) => {
                    Box::new(grpc_stats::GrpcStatsFilter::new(config.clone()))
                }
                HttpFilterConfig::GrpcWeb => Box::new(grpc_web::GrpcWebFilter),
                // Only the upstream connection has a place for it.
                HttpFilterConfig::Alpn(config) => {
                    alpn = Some(config.clone());
                    continue;
                }
                HttpFilterConfig::PeerMetadata(config) => {
                    Box::new(peer_metadata::PeerMetadataFilter::new(*config, worker))
                }
                HttpFilterConfig::OriginalSrc { mark } => {
                    Box::new(original_src::OriginalSrcFilter { mark: *mark })
                }
                HttpFilterConfig::Rbac(plan_of) => {
                    Box::new(rbac::RbacFilter::new(plan_of.clone(), stat_prefix, worker))
                }
                HttpFilterConfig::ExtAuthz(config) => Box::new(ext_authz::ExtAuthzFilter::new(
                    filter.name.clone(),
                    config.clone(),
                    stat_prefix,
                    worker,
                )),
                HttpFilterConfig::JwtAuthn(config) => Box::new(jwt_authn::JwtAuthnFilter::new(
                    config.clone(),
                    stat_prefix,
                    worker,
                )),
                HttpFilterConfig::IstioStats(config) => {
                    Box::new(istio_stats::IstioStatsFilter::new(config.clone(), worker))
                }
                HttpFilterConfig::HeaderMutation(config) => {
                    Box::new(header_mutation::HeaderMutations {
                        name: filter.name.clone(),
                        config: config.clone(),
                    })
                }
                HttpFilterConfig::HeaderToMetadata(config) => {
                    Box::new(metadata::HeaderToMetadataFilter(config.clone()))
                }
                HttpFilterConfig::SetMetadata(config) => {
                    Box::new(metadata::SetMetadataFilter(config.clone()))
                }
                HttpFilterConfig::SetFilterState(config) => {
                    Box::new(set_filter_state::SetFilterState {
                        name: filter.name.clone(),
                        config: config.clone(),
                    })
                }
                HttpFilterConfig::StatefulSession(config) => {
                    Box::new(stateful_session::StatefulSessionFilter::new(
                        config.clone(),
                        stat_prefix,
                        worker,
                    ))
                }
                HttpFilterConfig::LocalRateLimit(config) => {
                    Box::new(local_rate_limit::LocalRateLimitFilter::new(config.clone()))
                }
                HttpFilterConfig::RateLimit(config) => Box::new(rate_limit::RateLimitFilter::new(
                    filter.name.clone(),
                    filters.len(),
                    config.clone(),
                )),
                HttpFilterConfig::HealthCheck(config) => {
                    Box::new(health_check::HealthCheckFilter::new(config.clone()))
                }
                HttpFilterConfig::Buffer(limit) => Box::new(buffer::BufferFilter(*limit)),
                HttpFilterConfig::Lua(config) => Box::new(lua::LuaFilter::new(
                    filter.name.clone(),
                    filters.len(),
                    config.clone(),
                    stat_prefix,
                    worker,
                )),
            };
            filters.push(Live {
                name: filter.name.clone(),
                disabled: filter.disabled,
                interests: live.interests(),
                filter: live,
            });
        }
        let interests = filters
            .iter()
            .fold(Interests::default(), |all, live| all.and(live.interests));
        Filters {
            filters,
            interests,
            router,
            alpn,
        }
    }

    /// What `istio.alpn` offers to a cluster; `None` leaves that to the cluster.
    pub(crate) fn alpn(&self, cluster: &Cluster, version: Version) -> Option<&[Arc<str>]> {
        let overrides = &self.alpn.as_ref()?.overrides;
        let switch = cluster.metadata.lookup("istio", &["alpn_override"]);
        if switch.and_then(|switch| switch.as_str()) == Some("false") {
            return None;
        }
        let protocol = match version {
            Version::Http10 => AlpnProtocol::Http10,
            Version::Http11 => AlpnProtocol::Http11,
            Version::Http2 => AlpnProtocol::Http2,
        };
        let row = overrides
            .iter()
            .find(|row| row.upstream_protocol == protocol)?;
        Some(&row.alpn)
    }

    /// How many there are, the router not counted.
    pub(crate) fn len(&self) -> usize {
        self.filters.len()
    }

    /// Runs one filter on the request, from its beginning or after what it waited for.
    pub(crate) fn request(
        &self,
        index: usize,
        exchange: &mut Exchange<'_>,
        at: Stage,
        worker: &Worker,
    ) -> Step {
        let live = &self.filters[index];
        let route = exchange.route.clone();
        let config = route_config(&route, &live.name);
        let off = match config {
            Some(RouteFilterConfig::Disabled) => true,
            Some(_) => false,
            None => live.disabled,
        };
        if off {
            exchange.filters.off |= 1 << (index as u32 & 63);
            return Step::Continue;
        }
        if !live.interests.has(Interests::REQUEST) {
            return Step::Continue;
        }
        match at {
            Stage::Head => live.filter.request(exchange, config, worker),
            Stage::Resumed => live.filter.resumed(exchange, config, worker),
            Stage::Answered(answer) => live.filter.answered(exchange, config, worker, answer),
            Stage::Buffered(body, complete) => live
                .filter
                .buffered(exchange, config, worker, body, complete),
        }
    }

    /// Whether nobody looks at the bytes of the response's body.
    pub(crate) fn pass_response_data(&self, exchange: &Exchange<'_>) -> bool {
        // Those who look at data look at some messages alone, and remember which.
        !self.interests.has(Interests::RESPONSE_DATA)
            || exchange.filters.grpc.is_none()
                && exchange.filters.grpc_web.is_none()
                && !exchange.filters.lua.wait_for_response()
    }

    /// Shows a piece of the request's body to the filters, in their order; nothing may be left of it.
    ///
    /// # Errors
    /// The body is none that may go on.
    pub(crate) fn request_data(
        &self,
        exchange: &mut Exchange<'_>,
        data: &mut Bytes,
    ) -> Result<(), Refusal> {
        if !self.interests.has(Interests::REQUEST_DATA) {
            return Ok(());
        }
        for (index, live) in self.filters.iter().enumerate() {
            if live.sees(Interests::REQUEST_DATA, index, exchange) {
                live.filter.request_data(exchange, data)?;
            }
        }
        Ok(())
    }

    pub(crate) fn response(
        &self,
        exchange: &mut Exchange<'_>,
        head: &mut ResponseHead,
        worker: &Worker,
    ) {
        self.each(Interests::RESPONSE, exchange, |filter, exchange| {
            filter.response(exchange, head, worker);
        });
    }

    /// Whether a filter may want the bodies of messages, or wait with a response.
    pub(crate) fn take_bodies(&self) -> bool {
        self.interests.has(Interests::BODIES)
    }

    /// Whether this one may.
    pub(crate) fn takes_bodies(&self, index: usize) -> bool {
        self.filters[index].interests.has(Interests::BODIES)
    }

    /// Runs one filter on the head of a response.
    pub(crate) fn response_step(
        &self,
        index: usize,
        exchange: &mut Exchange<'_>,
        head: &mut ResponseHead,
        at: Stage,
        worker: &Worker,
    ) -> Step {
        let live = &self.filters[index];
        if !live.sees(Interests::RESPONSE, index, exchange) {
            return Step::Continue;
        }
        let route = exchange.route.clone();
        let config = route_config(&route, &live.name);
        live.filter
            .response_step(exchange, head, config, at, worker)
    }

    /// Tells the filters that all of the request's body has gone by; gives what they add to it.
    pub(crate) fn request_end(
        &self,
        exchange: &mut Exchange<'_>,
        mut trailers: Option<&mut Headers>,
    ) -> Option<Bytes> {
        let mut added = None;
        for (index, live) in self.filters.iter().enumerate() {
            if live.sees(Interests::BODIES, index, exchange) {
                let own = live.filter.request_end(exchange, trailers.as_deref_mut());
                added = added.or(own);
            }
        }
        added
    }

    /// Tells the filters that all of the response's body has gone by; gives what they add to it.
    pub(crate) fn response_end(
        &self,
        exchange: &mut Exchange<'_>,
        mut trailers: Option<&mut Headers>,
    ) -> Option<Bytes> {
        let mut added = None;
        self.each(Interests::BODIES, exchange, |filter, exchange| {
            let own = filter.response_end(exchange, trailers.as_deref_mut());
            added = added.take().or(own);
        });
        added
    }

    /// Shows a piece of the response's body to some of the filters, the last first.
    pub(crate) fn response_data_to(
        &self,
        which: Range<usize>,
        exchange: &mut Exchange<'_>,
        data: &mut Bytes,
    ) {
        if !self.interests.has(Interests::RESPONSE_DATA) {
            return;
        }
        for index in which.rev() {
            let live = &self.filters[index];
            if live.sees(Interests::RESPONSE_DATA, index, exchange) {
                live.filter.response_data(exchange, data);
            }
        }
    }

    /// Shows the response's trailers to the filters; gives what goes to the client in their place.
    pub(crate) fn trailers(
        &self,
        exchange: &mut Exchange<'_>,
        trailers: &mut Headers,
    ) -> Option<Bytes> {
        let mut end = None;
        self.each(Interests::RESPONSE, exchange, |filter, exchange| {
            filter.trailers(exchange, trailers);
            end = end.take().or_else(|| filter.end(exchange, trailers));
        });
        end
    }

    pub(crate) fn complete(&self, exchange: &mut Exchange<'_>, worker: &Worker) {
        self.each(Interests::COMPLETE, exchange, |filter, exchange| {
            filter.complete(exchange, worker);
        });
    }

    fn each(
        &self,
        interest: Interests,
        exchange: &mut Exchange<'_>,
        mut run: impl FnMut(&dyn Filter, &mut Exchange<'_>),
    ) {
        if !self.interests.has(interest) {
            return;
        }
        for (index, live) in self.filters.iter().enumerate().rev() {
            if live.sees(interest, index, exchange) {
                run(&*live.filter, exchange);
            }
        }
    }
}

impl Live {
    fn sees(&self, interest: Interests, index: usize, exchange: &Exchange<'_>) -> bool {
        self.interests.has(interest) && exchange.filters.off >> (index as u32 & 63) & 1 == 0
    }
}

/// What the route says about a filter; the most specific level wins.
fn route_config<'r>(route: &'r crate::http::RouteRef, name: &str) -> Option<&'r RouteFilterConfig> {
    route_configs(route, name).next()
}

/// What each level says about a filter, the most specific first.
fn route_configs<'r>(
    route: &'r crate::http::RouteRef,
    name: &str,
) -> impl Iterator<Item = &'r RouteFilterConfig> {
    let weighted = crate::router::headers::weighted(route).map(|entry| &entry.per_filter);
    let (virtual_host, at) = match route.get() {
        Some((virtual_host, route)) => (Some(&virtual_host.per_filter), Some(&route.per_filter)),
        None => (None, None),
    };
    let configuration = route.configuration().map(|routes| &routes.per_filter);
    [weighted, at, virtual_host, configuration]
        .into_iter()
        .flatten()
        .filter(|configs| !configs.is_empty())
        .filter_map(move |configs| configs.of(name))
}
