//! What is known about one request: filters, the router and access logs read and write it.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use outrigger_http::{Headers, Method, RequestHead, ResponseHead, Version};
use serde_json::Value;
use smallvec::SmallVec;
use tls::session::Session;

use super::Flags;
use crate::{
    cluster::{Established, Host, LocalPlan},
    filter::FilterData,
    filter_state::FilterState,
    listener::{ConnectionInfo, UpstreamSource},
    plan::{
        Route, RouteConfiguration, VirtualHost,
        filter_state::ObjectKind,
        matcher_tree::PeerName,
        route::{Action, RouteAction},
        route_match::{RequestView, RouteOutcome},
    },
    proxy_protocol,
    trace::Trace,
    worker::moment,
};

/// One request from its head to its log line.
#[derive(Debug)]
pub struct Exchange<'c> {
    /// The downstream connection.
    pub connection: &'c ConnectionInfo,
    /// The request, as it will go upstream.
    pub request: RequestHead,
    /// The final response's head, once there is one.
    pub response: Option<ResponseHead>,
    /// The response's trailers.
    pub trailers: Option<Headers>,
    /// Why it ended as it did.
    pub flags: Flags,
    /// `%RESPONSE_CODE_DETAILS%`.
    pub details: Cow<'static, str>,
    /// The client, by the rules about x-forwarded-for.
    pub client: Option<IpAddr>,
    /// Whether the client counts as internal.
    pub internal: bool,
    /// The route it took.
    pub route: RouteRef,
    /// What happened upstream.
    pub upstream: UpstreamInfo,
    /// When, and how much.
    pub progress: Progress,
    /// How its routes were found.
    pub(crate) resolution: Resolution,
    /// The stream's one random number.
    pub random: u64,
    /// What filters tell each other and the log.
    pub filter_state: FilterState,
    /// `%DYNAMIC_METADATA%` by namespace.
    pub dynamic_metadata: BTreeMap<String, Value>,
    /// The host that a session names (`address:port`), and whether no other will do.
    pub override_host: Option<(Box<str>, bool)>,
    /// A filter has changed what the route was chosen by.
    pub(crate) clear_route: bool,
    /// Redirects of the upstream that were followed: how many, and to which routes.
    pub(crate) redirects: Vec<(u32, u32)>,
    /// What single filters keep from one phase to the next.
    pub(crate) filters: FilterData,
    /// Body of a reply of our own, for `%LOCAL_REPLY_BODY%`.
    pub local_reply: Cow<'static, str>,
    /// Sampled for traces.
    pub traced: bool,
    /// Its place in a trace.
    pub(crate) trace: Option<Trace>,
    /// What the peer on the application's side calls the operation.
    pub(crate) operation: Option<Box<str>>,
    /// Which of the filters of upgrades it goes through; `None` is the connection manager's own.
    pub(crate) upgrade_filters: Option<u8>,
    /// A connection as a whole, so that everything about requests is absent.
    pub tcp: bool,
    /// Address that upstream connections come from.
    pub source: Option<UpstreamSource>,
    /// What `%ACCESS_LOG_TYPE%` says.
    pub log_type: &'static str,
}

/// The virtual host and route of a request; they keep their configuration alive.
#[derive(Debug, Default, Clone)]
pub struct RouteRef {
    routes: Option<Arc<RouteConfiguration>>,
    virtual_host: Option<u32>,
    route: Option<u32>,
    /// Index of the weighted cluster that was drawn.
    pub weighted: Option<usize>,
    /// The virtual host wants TLS.
    pub tls_redirect: bool,
}

/// Hosts that were tried; most requests try one.
pub(super) type Tried = SmallVec<[Arc<Host>; 2]>;

/// What happened upstream.
#[derive(Debug, Default)]
pub struct UpstreamInfo {
    /// The name that the route has, where it is not the cluster's: there is none, or the named one is an aggregate.
    pub named: Option<Arc<str>>,
    /// The cluster. Of a request that a filter answered it is the one that the route names, as logs tell it.
    pub cluster: Option<LocalPlan>,
    /// The router has looked for a host: the route's own stats count the response.
    pub routed: bool,
    /// The host of the last attempt.
    pub host: Option<Arc<Host>>,
    /// The hosts of all attempts, in order.
    pub tried: Tried,
    /// Our side of the connection to it.
    pub local: Option<SocketAddr>,
    /// How the connection came to be.
    pub established: Option<Established>,
    /// The connections of all attempts, in order.
    pub connections: SmallVec<[u64; 2]>,
    /// How long the last attempt waited for its connection.
    pub pool_ready: Option<Duration>,
    /// How the connections ended, where that is known when the line is written: those of TCP, and that of a client
    /// that went away from its request.
    pub closed: CloseTypes,
    /// What TLS agreed on with it.
    pub tls: Option<Arc<Session>>,
    /// The protocol spoken to it.
    pub protocol: Option<Version>,
    /// Attempts made.
    pub attempts: u32,
    /// The status that came from it, or from here, and goes on to the client; 0 before.
    pub status: u16,
    /// `%UPSTREAM_TRANSPORT_FAILURE_REASON%`.
    pub failure: String,
    /// From the head of the last attempt to the first byte of the response.
    pub response_time: Option<Duration>,
}

impl UpstreamInfo {
    /// The route names this cluster; `plan` is what is found by the name.
    pub(crate) fn wants(&mut self, name: &str, plan: Option<LocalPlan>) {
        let own = plan.as_ref().is_some_and(|plan| *plan.name == *name);
        self.named = (!own).then(|| name.into());
        self.cluster = plan;
    }

    /// The name of the cluster that was wanted, whether it exists or not.
    pub fn cluster_name(&self) -> Option<&str> {
        let own = self.cluster.as_ref().map(|cluster| &cluster.name);
        self.named.as_ref().or(own).map(|name| &**name)
    }
}

/// How the two connections ended, in Envoy's words.
#[derive(Debug, Default, Clone, Copy)]
pub struct CloseTypes {
    /// How the client's ended.
    pub downstream: Option<&'static str>,
    /// Why this side ended it.
    pub downstream_why: Option<&'static str>,
    /// How the host's ended.
    pub upstream: Option<&'static str>,
    /// Why this side ended it.
    pub upstream_why: Option<&'static str>,
}

/// What it took to find the routes of a request.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Resolution {
    /// How often one was looked for.
    pub(crate) count: u32,
    /// How long that lasted, where somebody wants to know ([`crate::plan::format::wants_route_times`]).
    pub(crate) lasted: Duration,
}

/// Times and sizes.
#[derive(Debug)]
pub struct Progress {
    /// When the head had arrived.
    pub start: Instant,
    /// The same as a date.
    pub start_time: SystemTime,
    /// When the whole request had arrived.
    pub request_received: Option<Instant>,
    /// When the request began to go upstream.
    pub upstream_first_sent: Option<Instant>,
    /// When the whole request had gone upstream.
    pub upstream_last_sent: Option<Instant>,
    /// When the response's head came.
    pub upstream_first_received: Option<Instant>,
    /// When the first bytes of its body came.
    pub upstream_first_body: Option<Instant>,
    /// When the response was complete.
    pub upstream_last_received: Option<Instant>,
    /// When the head of the response went to the client.
    pub downstream_first_sent: Option<Instant>,
    /// When all of it was handed over.
    pub end: Option<Instant>,
    /// Body bytes from the client.
    pub received: u64,
    /// Body bytes to the client.
    pub sent: u64,
}

impl<'c> Exchange<'c> {
    /// A request whose head has just arrived.
    pub fn new(connection: &'c ConnectionInfo, request: RequestHead, random: u64) -> Self {
        Exchange {
            connection,
            request,
            response: None,
            trailers: None,
            flags: Flags::default(),
            details: Cow::Borrowed(""),
            client: connection.remote.map(|address| address.ip()),
            internal: false,
            route: RouteRef::default(),
            upstream: UpstreamInfo::default(),
            progress: Progress::new(),
            resolution: Resolution::default(),
            random,
            filter_state: FilterState::default(),
            dynamic_metadata: metadata_of(connection),
            override_host: None,
            clear_route: false,
            redirects: Vec::new(),
            filters: FilterData::default(),
            local_reply: Cow::Borrowed(""),
            traced: false,
            trace: None,
            operation: None,
            upgrade_filters: None,
            tcp: false,
            source: connection.source,
            log_type: "DownstreamEnd",
        }
    }

    /// A connection as a whole, for logs and metrics of TCP.
    pub(crate) fn of_connection(connection: &'c ConnectionInfo, random: u64) -> Self {
        let nothing = RequestHead::new(Version::Http11, Method::Get, "", "");
        let mut exchange = Self::new(connection, nothing, random);
        exchange.tcp = true;
        exchange.progress.start = connection.accepted;
        exchange.progress.start_time = connection.accepted_at;
        exchange.flags = connection
            .response_flag
            .and_then(Flags::from_short)
            .unwrap_or_default();
        exchange
    }

    /// Status of the response, also while its head is made of what came from upstream; 0 where there is none.
    pub fn status(&self) -> u16 {
        let sent = self.response.as_ref().map(|response| response.status);
        sent.unwrap_or(self.upstream.status)
    }

    /// Looks the route up.
    pub fn find_route(&mut self, routes: Option<Arc<RouteConfiguration>>) {
        self.route = match routes {
            Some(routes) => RouteRef::find(routes, self, self.random),
            None => RouteRef::default(),
        };
    }

    /// Bytes of a body that may be held back: as the route says, else the listener's.
    pub(crate) fn buffer_limit(&self) -> u64 {
        let route = self.route.get().and_then(|(virtual_host, route)| {
            route
                .request_buffer_limit
                .or(virtual_host.request_buffer_limit)
        });
        route.unwrap_or(self.connection.listener.per_connection_buffer_limit.into())
    }

    /// Where this is a CONNECT whose payload goes to the upstream as raw bytes: the PROXY header that they begin with.
    pub(super) fn terminates_connect(&self) -> Option<Option<proxy_protocol::Version>> {
        if self.request.method != Method::Connect {
            return None;
        }
        let mut upgrades = self.route.action()?.upgrades.iter();
        let found = upgrades.find(|upgrade| upgrade.connect_terminate && upgrade.enabled)?;
        Some(found.connect_proxy)
    }

    /// How long it has lasted, in milliseconds, as `%DURATION%` tells it.
    pub fn duration(&self) -> Duration {
        self.progress
            .end
            .unwrap_or_else(Instant::now)
            .saturating_duration_since(self.progress.start)
    }

    /// Something that a filter said about this request, or about its connection.
    pub fn state(&self, key: &str) -> Option<&Value> {
        let own = self.filter_state.get(key);
        own.or_else(|| self.connection.state.get(key))
    }

    /// The object of a kind that something acts by, of the request or of its connection.
    pub(crate) fn well_known(&self, kind: ObjectKind) -> Option<&Value> {
        let own = self.filter_state.well_known(kind);
        own.or_else(|| self.connection.state.well_known(kind))
    }

    /// The object that a hash policy goes by.
    pub(crate) fn hashable_state(&self, key: &str) -> Option<&Value> {
        match self.filter_state.get(key) {
            Some(_) => self.filter_state.hashable(key),
            None => self.connection.state.hashable(key),
        }
    }

    /// Says something about this request.
    pub fn set_state(&mut self, key: Arc<str>, value: Value) {
        self.filter_state.set(key, value);
    }
}

/// What listener filters and network filters have left; most connections have nothing.
pub(crate) fn metadata_of(connection: &ConnectionInfo) -> BTreeMap<String, Value> {
    let header = connection.proxy.as_ref().map(|proxy| &proxy.metadata);
    let mut all = header.cloned().unwrap_or_default();
    if let Some(own) = &connection.metadata {
        all.extend(
            own.iter()
                .map(|(name, value)| (name.clone(), value.clone())),
        );
    }
    all
}

impl RouteRef {
    /// The route of a request.
    pub(crate) fn find(
        routes: Arc<RouteConfiguration>,
        request: &impl RequestView,
        random: u64,
    ) -> Self {
        let mut found = Self::default();
        match routes.find(request, random) {
            RouteOutcome::Found(at) => {
                found.virtual_host = Some(at.virtual_host_index);
                found.route = Some(at.route_index);
            }
            RouteOutcome::TlsRedirect(_) => found.tls_redirect = true,
            RouteOutcome::NoRoute(_) | RouteOutcome::NoVirtualHost => {}
        }
        found.routes = Some(routes);
        found
    }

    /// The configuration.
    pub fn configuration(&self) -> Option<&RouteConfiguration> {
        self.routes.as_deref()
    }

    /// The numbers of virtual host and route.
    pub(crate) fn numbers(&self) -> Option<(u32, u32)> {
        Some((self.virtual_host?, self.route?))
    }

    /// Virtual host and route.
    pub fn get(&self) -> Option<(&VirtualHost, &Route)> {
        self.routes
            .as_ref()?
            .route_at(self.virtual_host?, self.route?)
    }

    /// The route.
    pub fn route(&self) -> Option<&Route> {
        self.get().map(|(_, route)| route)
    }

    /// The action, where the request is forwarded.
    pub fn action(&self) -> Option<&RouteAction> {
        match &self.route()?.action {
            Action::Route(action) => Some(action),
            _ => None,
        }
    }
}

impl Progress {
    fn new() -> Progress {
        let start = moment::now();
        Progress {
            start,
            start_time: moment::wall(start),
            request_received: None,
            upstream_first_sent: None,
            upstream_last_sent: None,
            upstream_first_received: None,
            upstream_first_body: None,
            upstream_last_received: None,
            downstream_first_sent: None,
            end: None,
            received: 0,
            sent: 0,
        }
    }

    /// Bytes of the response's body have come; those that nobody `waited` for came with its head.
    pub(super) fn body_received(&mut self, waited: bool) {
        if self.upstream_first_body.is_none() {
            let with_head = self.upstream_first_received.filter(|_| !waited);
            self.upstream_first_body = with_head.or_else(|| Some(moment::now()));
        }
    }
}

impl RequestView for Exchange<'_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        if name.starts_with(':') {
            return self.request.get(name).map(Cow::Borrowed);
        }
        self.request.headers.joined(name)
    }

    fn any_field(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> Option<bool> {
        if name.starts_with(':') {
            return self.request.get(name).map(fits);
        }
        let mut found = None;
        for value in self.request.headers.get_all(name) {
            found = Some(found == Some(true) || fits(value));
        }
        found
    }

    fn host(&self) -> &[u8] {
        self.request.authority_bytes()
    }

    fn path(&self) -> &[u8] {
        self.request.path_bytes()
    }

    fn client_certificate(&self) -> Option<(bool, bool)> {
        let session = self.connection.tls.as_ref()?;
        Some((session.peer.is_some(), session.peer_trusted))
    }

    fn is_connect(&self) -> bool {
        self.request.method == Method::Connect
    }

    fn dynamic_metadata(&self, namespace: &str) -> Option<&Value> {
        self.dynamic_metadata.get(namespace)
    }

    fn filter_state(&self, key: &str) -> Option<&Value> {
        self.state(key)
    }

    fn destination(&self) -> Option<SocketAddr> {
        self.connection.local
    }

    fn source(&self) -> Option<SocketAddr> {
        self.connection.remote
    }

    fn server_name(&self) -> Option<&str> {
        self.connection.requested_server_name.as_deref()
    }

    fn peer_names(&self, kind: PeerName) -> Option<String> {
        self.connection.joined_peer_names(kind)
    }
}
