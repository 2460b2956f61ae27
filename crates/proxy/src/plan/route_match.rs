//! Which virtual host and which route take a request.

use std::{borrow::Cow, collections::HashMap, fmt, net::SocketAddr};

use foldhash::fast::RandomState;
use serde_json::Value;

use super::{
    matcher::{FilterStateMatcher, MetadataMatcher, QueryMatcher, RuntimeFraction},
    matcher_tree::PeerName,
    route::{
        ClusterWeight, PathMatch, RequireTls, Route, RouteConfiguration, RouteMatch, TlsMatch,
        VirtualCluster, VirtualHost, WeightedClusters,
    },
};

/// What matching reads of a request. Whoever holds a request head implements it.
pub trait RequestView {
    /// The value of a header by its lower-case name, pseudo headers (`:method`, `:authority`, `:scheme`, `:path`)
    /// included. Several fields of one name are one value, joined by commas.
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>>;

    /// Whether one of the fields of a name fits, each by itself; `None` where there is no field.
    fn any_field(&self, name: &str, fits: &mut dyn FnMut(&[u8]) -> bool) -> Option<bool> {
        self.header(name).map(|value| fits(&value))
    }

    /// Host header or `:authority`, with its port.
    fn host(&self) -> &[u8];

    /// Path with its query; empty for a CONNECT without one.
    fn path(&self) -> &[u8];

    /// Whether the method is CONNECT.
    fn is_connect(&self) -> bool {
        self.header(":method").is_some_and(|m| *m == *b"CONNECT")
    }

    /// Dynamic metadata of the request at a namespace.
    fn dynamic_metadata(&self, _namespace: &str) -> Option<&Value> {
        None
    }

    /// Whether the client presented a certificate, and whether it was validated; `None` without TLS.
    fn client_certificate(&self) -> Option<(bool, bool)> {
        None
    }

    /// A filter state object.
    fn filter_state(&self, _key: &str) -> Option<&Value> {
        None
    }

    /// Our address, as the client meant it.
    fn destination(&self) -> Option<SocketAddr> {
        None
    }

    /// The client's address.
    fn source(&self) -> Option<SocketAddr> {
        None
    }

    /// The server name of the ClientHello.
    fn server_name(&self) -> Option<&str> {
        None
    }

    /// Names of the client's certificate, if it leads to somebody who is trusted and has such names; joined by commas.
    fn peer_names(&self, _kind: PeerName) -> Option<String> {
        None
    }

    /// Whether a request with this random number is in a share.
    fn is_in(&self, fraction: &RuntimeFraction, random: u64) -> bool {
        fraction.default.hits(random)
    }
}

/// Where a request ends.
#[derive(Debug, Clone, Copy)]
pub enum RouteOutcome<'a> {
    /// On a route.
    Found(Found<'a>),
    /// The virtual host wants TLS: redirect to https with 301.
    TlsRedirect(&'a VirtualHost),
    /// No route of the virtual host fits: 404.
    NoRoute(&'a VirtualHost),
    /// No virtual host has the domain: 404.
    NoVirtualHost,
}

/// The route of a request. The two numbers find it again in the same configuration.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    /// Index in [`RouteConfiguration::virtual_hosts`].
    pub virtual_host_index: u32,
    /// Index in [`VirtualHost::routes`].
    pub route_index: u32,
    /// The virtual host.
    pub virtual_host: &'a VirtualHost,
    /// The route.
    pub route: &'a Route,
}

impl RouteConfiguration {
    /// The route of a request; `random` decides about shares of requests (the stream's one random number).
    pub fn find<'a>(
        &'a self,
        request: &(impl RequestView + ?Sized),
        random: u64,
    ) -> RouteOutcome<'a> {
        let Some(virtual_host_index) = self.virtual_host_of(request) else {
            return RouteOutcome::NoVirtualHost;
        };
        let virtual_host: &VirtualHost = &self.virtual_hosts[virtual_host_index as usize];
        if tls_redirect(virtual_host.require_tls, request) {
            return RouteOutcome::TlsRedirect(virtual_host);
        }
        let path = self.path_of(request);
        let routes = match &virtual_host.matcher {
            None => 0..virtual_host.routes.len(),
            Some(matcher) => match matcher.find(request) {
                Some(&(from, to)) => from as usize..to as usize,
                None => return RouteOutcome::NoRoute(virtual_host),
            },
        };
        for index in routes {
            let route = &virtual_host.routes[index];
            if route.matches.fits(&path, request, random) {
                return RouteOutcome::Found(Found {
                    virtual_host_index,
                    route_index: index as u32,
                    virtual_host,
                    route,
                });
            }
        }
        RouteOutcome::NoRoute(virtual_host)
    }

    /// The route at the numbers of a [`Found`] of this configuration.
    pub fn route_at(&self, virtual_host: u32, route: u32) -> Option<(&VirtualHost, &Route)> {
        let virtual_host: &VirtualHost = self.virtual_hosts.get(virtual_host as usize)?;
        Some((virtual_host, virtual_host.routes.get(route as usize)?))
    }

    fn virtual_host_of(&self, request: &(impl RequestView + ?Sized)) -> Option<u32> {
        match &self.vhost_header {
            // Where one virtual host serves every domain nobody looks at the header.
            Some(name) if !self.domains.is_any_alone() => {
                let value = request.header(name)?;
                self.domains.find(&value, self.ignore_port_in_host_matching)
            }
            _ => self
                .domains
                .find(request.host(), self.ignore_port_in_host_matching),
        }
    }

    /// The part of the path that routes are matched with: without query and fragment.
    pub(crate) fn path_of<'r>(&self, request: &'r (impl RequestView + ?Sized)) -> Cow<'r, [u8]> {
        let path = without_query(request.path());
        match self.ignore_path_parameters {
            true => without_parameters(path),
            false => path.into(),
        }
    }
}

/// A path without what stands behind a `;` in each of its segments.
fn without_parameters(path: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr(b';', path).is_none() {
        return path.into();
    }
    let own = |segment: &[u8]| segment.split(|b| *b == b';').next().map(<[u8]>::to_vec);
    let segments: Vec<Vec<u8>> = path.split(|b| *b == b'/').filter_map(own).collect();
    segments.join(&b'/').into()
}

/// A path without query and fragment.
pub(crate) fn without_query(path: &[u8]) -> &[u8] {
    &path[..memchr::memchr2(b'?', b'#', path).unwrap_or(path.len())]
}

fn tls_redirect(requirement: RequireTls, request: &(impl RequestView + ?Sized)) -> bool {
    let plain = || {
        request
            .header("x-forwarded-proto")
            .is_none_or(|p| *p != *b"https")
    };
    match requirement {
        RequireTls::None => false,
        RequireTls::ExternalOnly => {
            request
                .header("x-envoy-internal")
                .is_none_or(|v| *v != *b"true")
                && plain()
        }
        RequireTls::All => plain(),
    }
}

/// The first condition of a route that a request does not meet; numbers are those of the message's lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the fields.
pub enum Misfit {
    RuntimeFraction,
    Path,
    Grpc,
    Header(usize),
    QueryParameter(usize),
    Cookie(usize),
    TlsContext,
    DynamicMetadata(usize),
    FilterState(usize),
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RuntimeFraction => f.write_str("runtime_fraction"),
            Self::Path => f.write_str("path"),
            Self::Grpc => f.write_str("grpc"),
            Self::Header(index) => write!(f, "headers[{index}]"),
            Self::QueryParameter(index) => write!(f, "query_parameters[{index}]"),
            Self::Cookie(index) => write!(f, "cookies[{index}]"),
            Self::TlsContext => f.write_str("tls_context"),
            Self::DynamicMetadata(index) => write!(f, "dynamic_metadata[{index}]"),
            Self::FilterState(index) => write!(f, "filter_state[{index}]"),
        }
    }
}

impl RouteMatch {
    /// Whether a request with this path (without query) fits.
    pub fn fits(&self, path: &[u8], request: &(impl RequestView + ?Sized), random: u64) -> bool {
        self.misfit(path, request, random).is_none()
    }

    /// The condition that a request with this path (without query) does not meet.
    pub fn misfit(
        &self,
        path: &[u8],
        request: &(impl RequestView + ?Sized),
        random: u64,
    ) -> Option<Misfit> {
        if let Some(fraction) = &self.runtime_fraction
            && !request.is_in(fraction, random)
        {
            return Some(Misfit::RuntimeFraction);
        }
        if !self.path_fits(path, request) {
            return Some(Misfit::Path);
        }
        if self.grpc && !is_grpc(request) {
            return Some(Misfit::Grpc);
        }
        if let Some(index) = self.headers.iter().position(|h| !h.matches(request)) {
            return Some(Misfit::Header(index));
        }
        let query = |q: &QueryMatcher| !q.matches(request.path());
        if let Some(index) = self.query_parameters.iter().position(query) {
            return Some(Misfit::QueryParameter(index));
        }
        if let Some(index) = self.cookies.iter().position(|c| !c.matches(request)) {
            return Some(Misfit::Cookie(index));
        }
        if self.tls.is_some_and(|tls| !tls.fits(request)) {
            return Some(Misfit::TlsContext);
        }
        let metadata = |m: &MetadataMatcher| {
            let root = request.dynamic_metadata(&m.filter);
            !m.matches(root.and_then(|r| m.path.iter().try_fold(r, |v, k| v.get(&**k))))
        };
        if let Some(index) = self.dynamic_metadata.iter().position(metadata) {
            return Some(Misfit::DynamicMetadata(index));
        }
        let state = |m: &FilterStateMatcher| !m.matches(request.filter_state(&m.key));
        self.filter_state
            .iter()
            .position(state)
            .map(Misfit::FilterState)
    }

    fn path_fits(&self, path: &[u8], request: &(impl RequestView + ?Sized)) -> bool {
        let same = |a: &[u8], b: &str| match self.case_sensitive {
            true => a == b.as_bytes(),
            false => a.eq_ignore_ascii_case(b.as_bytes()),
        };
        if let PathMatch::Connect = self.path {
            return request.is_connect();
        }
        if path.is_empty() {
            return false;
        }
        match &self.path {
            PathMatch::Prefix(prefix) => path.get(..prefix.len()).is_some_and(|p| same(p, prefix)),
            PathMatch::Path(whole) => same(path, whole),
            PathMatch::PathSeparatedPrefix(prefix) => {
                path.get(..prefix.len()).is_some_and(|p| same(p, prefix))
                    && path.get(prefix.len()).is_none_or(|next| *next == b'/')
            }
            PathMatch::Regex(regex) => regex.is_match(path),
            // Its own parameters are part of it, whatever `ignore_path_parameters_in_path_matching` says.
            PathMatch::Template(template) => template.is_match(without_query(request.path())),
            PathMatch::Connect => false,
        }
    }
}

impl TlsMatch {
    fn fits(self, request: &(impl RequestView + ?Sized)) -> bool {
        match request.client_certificate() {
            Some((presented, validated)) => {
                self.presented.is_none_or(|want| want == presented)
                    && self.validated.is_none_or(|want| want == validated)
            }
            None => self.presented != Some(true) && self.validated != Some(true),
        }
    }
}

/// `application/grpc` or `application/grpc+…`.
fn is_grpc(request: &(impl RequestView + ?Sized)) -> bool {
    request.header("content-type").is_some_and(|value| {
        value
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest, [] | [b'+', ..]))
    })
}

impl VirtualHost {
    /// The virtual cluster of a request: the first that fits, else `other`; `None` where none is configured.
    pub fn virtual_cluster(&self, request: &(impl RequestView + ?Sized)) -> Option<&str> {
        if self.virtual_clusters.is_empty() {
            return None;
        }
        Some(self.named_virtual_cluster(request).unwrap_or("other"))
    }

    /// The virtual cluster whose matchers fit: the stats' `other` is nobody's name.
    pub fn named_virtual_cluster(&self, request: &(impl RequestView + ?Sized)) -> Option<&str> {
        let fits = |c: &&VirtualCluster| c.headers.iter().all(|h| h.matches(request));
        let found = self.virtual_clusters.iter().find(fits);
        found.map(|cluster| &*cluster.name)
    }
}

impl WeightedClusters {
    /// The entry for a request with this random number.
    pub fn pick(&self, random: u64) -> &ClusterWeight {
        let mut rest = random % self.total;
        for entry in &self.clusters {
            let weight = u64::from(entry.weight);
            if rest < weight {
                return entry;
            }
            rest -= weight;
        }
        &self.clusters[self.clusters.len() - 1]
    }
}

/// Virtual hosts by domain: exact, then the longest `*suffix`, then the longest `prefix*`, then `*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DomainTable {
    exact: ByDomain,
    /// By length of the fixed part, longest first.
    suffixes: Vec<(usize, ByDomain)>,
    prefixes: Vec<(usize, ByDomain)>,
    any: Option<u32>,
}

/// Indices of virtual hosts.
type ByDomain = HashMap<Box<[u8]>, u32, RandomState>;

impl DomainTable {
    /// Adds a domain; false when it is there already.
    pub(crate) fn insert(&mut self, domain: &str, virtual_host: u32) -> bool {
        let domain = domain.to_ascii_lowercase();
        if domain == "*" {
            return self.any.replace(virtual_host).is_none();
        }
        let (list, fixed) = if let Some(suffix) = domain.strip_prefix('*') {
            (&mut self.suffixes, suffix)
        } else if let Some(prefix) = domain.strip_suffix('*') {
            (&mut self.prefixes, prefix)
        } else {
            return self
                .exact
                .insert(domain.into_bytes().into(), virtual_host)
                .is_none();
        };
        let at = match list.binary_search_by(|(length, _)| fixed.len().cmp(length)) {
            Ok(at) => at,
            Err(at) => {
                list.insert(at, (fixed.len(), HashMap::default()));
                at
            }
        };
        list[at]
            .1
            .insert(fixed.as_bytes().into(), virtual_host)
            .is_none()
    }

    /// Whether there is no domain but `*`, or none at all.
    fn is_any_alone(&self) -> bool {
        self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty()
    }

    /// The virtual host of a host header.
    pub(crate) fn find(&self, host: &[u8], ignore_port: bool) -> Option<u32> {
        if self.is_any_alone() {
            return self.any;
        }
        let host = if ignore_port {
            without_port(host)
        } else {
            host
        };
        let host: Cow<'_, [u8]> = match host.iter().any(u8::is_ascii_uppercase) {
            true => host.to_ascii_lowercase().into(),
            false => host.into(),
        };
        if let Some(found) = self.exact.get(&*host) {
            return Some(*found);
        }
        // The star stands for at least one character.
        let suffix = self
            .suffixes
            .iter()
            .filter(|(length, _)| *length < host.len());
        let prefix = self
            .prefixes
            .iter()
            .filter(|(length, _)| *length < host.len());
        suffix
            .filter_map(|(length, map)| map.get(&host[host.len() - length..]))
            .chain(prefix.filter_map(|(length, map)| map.get(&host[..*length])))
            .next()
            .copied()
            .or(self.any)
    }
}

/// A host header without its port.
pub fn without_port(host: &[u8]) -> &[u8] {
    let Some(colon) = memchr::memrchr(b':', host) else {
        return host;
    };
    // A colon inside brackets belongs to an IPv6 address.
    let bracketed = memchr::memrchr(b']', host).is_some_and(|bracket| bracket > colon);
    let bare_ipv6 = host[0] != b'[' && memchr::memchr(b':', host) != Some(colon);
    let port = &host[colon + 1..];
    if bracketed || bare_ipv6 || !port.iter().all(u8::is_ascii_digit) {
        return host;
    }
    &host[..colon]
}
