//! `xds.type.matcher.v3.Matcher`: a tree of conditions that ends in an action.
//!
//! What the actions are is the holder's choice: a virtual host's are routes. A tree without a fitting branch gives
//! nothing; an action that is marked `keep_matching` is left out, and the search goes on.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use ipnet::IpNet;

use super::{
    matcher::{StringMatcher, query_parameter},
    route_match::RequestView,
};

/// A matcher whose actions are of type `A`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matcher<A> {
    /// The branches.
    pub branches: Branches<A>,
    /// Where none of them gives an action.
    pub on_no_match: Option<Box<OnMatch<A>>>,
}

/// The branches of a [`Matcher`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Branches<A> {
    /// None.
    None,
    /// The first whose predicate holds.
    List(Vec<(Predicate, OnMatch<A>)>),
    /// The one with the input's value.
    Exact(Input, BTreeMap<Box<[u8]>, OnMatch<A>>),
    /// The longest that the input's value begins with.
    Prefix(Input, Vec<(Box<[u8]>, OnMatch<A>)>),
}

/// What a branch leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnMatch<A> {
    /// Action or further matcher.
    pub target: Target<A>,
    /// The search goes on as if this had not matched.
    pub keep_matching: bool,
}

/// What a branch leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target<A> {
    /// The end.
    Action(A),
    /// Another matcher.
    Matcher(Box<Matcher<A>>),
}

/// Condition of a branch of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Predicate {
    /// On an input.
    Single(Input, Condition),
    /// One of them holds.
    Or(Vec<Predicate>),
    /// All of them hold.
    And(Vec<Predicate>),
    /// It does not hold.
    Not(Box<Predicate>),
}

/// Condition on the value of an input. A missing value meets none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// On its text.
    Text(StringMatcher),
    /// An address in one of these ranges.
    Ip(Vec<IpNet>),
}

/// What a matcher looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A request header (lower case).
    Header(Arc<str>),
    /// A query parameter.
    QueryParameter(Arc<str>),
    /// Our address.
    DestinationIp,
    /// Our port.
    DestinationPort,
    /// The client's address.
    SourceIp,
    /// The client's port.
    SourcePort,
    /// The server name of the ClientHello.
    ServerName,
    /// Names of the client's certificate, joined by commas.
    Peer(PeerName),
}

/// Which names of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerName {
    /// Its URIs.
    Uri,
    /// Its DNS names.
    Dns,
    /// Its subject.
    Subject,
}

impl<A> Matcher<A> {
    /// The action for a request.
    pub fn find(&self, request: &(impl RequestView + ?Sized)) -> Option<&A> {
        let found = match &self.branches {
            Branches::None => None,
            Branches::List(list) => list
                .iter()
                .filter(|(predicate, _)| predicate.holds(request))
                .find_map(|(_, on_match)| on_match.find(request)),
            Branches::Exact(input, map) => input
                .value(request)
                .and_then(|value| map.get(&*value))
                .and_then(|on_match| on_match.find(request)),
            Branches::Prefix(input, list) => input.value(request).and_then(|value| {
                list.iter()
                    .filter(|(prefix, _)| value.starts_with(prefix))
                    .find_map(|(_, on_match)| on_match.find(request))
            }),
        };
        found.or_else(|| self.on_no_match.as_ref()?.find(request))
    }
}

impl<A> Matcher<A> {
    /// Whether one of the inputs is one of these.
    pub fn asks(&self, these: &dyn Fn(&Input) -> bool) -> bool {
        let here = match &self.branches {
            Branches::None => false,
            Branches::List(list) => list
                .iter()
                .any(|(predicate, then)| predicate.asks(these) || then.asks(these)),
            Branches::Exact(input, map) => {
                these(input) || map.values().any(|then| then.asks(these))
            }
            Branches::Prefix(input, list) => {
                these(input) || list.iter().any(|(_, then)| then.asks(these))
            }
        };
        here || self
            .on_no_match
            .as_ref()
            .is_some_and(|then| then.asks(these))
    }
}

impl<A> OnMatch<A> {
    fn asks(&self, these: &dyn Fn(&Input) -> bool) -> bool {
        match &self.target {
            Target::Action(_) => false,
            Target::Matcher(matcher) => matcher.asks(these),
        }
    }

    fn find(&self, request: &(impl RequestView + ?Sized)) -> Option<&A> {
        if self.keep_matching {
            return None;
        }
        match &self.target {
            Target::Action(action) => Some(action),
            Target::Matcher(matcher) => matcher.find(request),
        }
    }
}

impl Predicate {
    fn asks(&self, these: &dyn Fn(&Input) -> bool) -> bool {
        match self {
            Self::Single(input, _) => these(input),
            Self::Or(list) | Self::And(list) => list.iter().any(|p| p.asks(these)),
            Self::Not(predicate) => predicate.asks(these),
        }
    }

    fn holds(&self, request: &(impl RequestView + ?Sized)) -> bool {
        match self {
            Self::Single(input, condition) => input
                .value(request)
                .is_some_and(|value| condition.holds(&value)),
            Self::Or(list) => list.iter().any(|p| p.holds(request)),
            Self::And(list) => list.iter().all(|p| p.holds(request)),
            Self::Not(predicate) => !predicate.holds(request),
        }
    }
}

impl Condition {
    fn holds(&self, value: &[u8]) -> bool {
        match self {
            Self::Text(matcher) => matcher.matches(value),
            Self::Ip(ranges) => std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse().ok())
                .is_some_and(|ip: std::net::IpAddr| ranges.iter().any(|net| net.contains(&ip))),
        }
    }
}

impl Input {
    fn value<'r>(&self, request: &'r (impl RequestView + ?Sized)) -> Option<Cow<'r, [u8]>> {
        let text = |value: String| Some(Cow::Owned(value.into_bytes()));
        match self {
            Self::Header(name) => request.header(name),
            Self::QueryParameter(name) => {
                query_parameter(request.path(), name.as_bytes()).map(Cow::Borrowed)
            }
            Self::DestinationIp => text(request.destination()?.ip().to_string()),
            Self::DestinationPort => text(request.destination()?.port().to_string()),
            Self::SourceIp => text(request.source()?.ip().to_string()),
            Self::SourcePort => text(request.source()?.port().to_string()),
            Self::ServerName => Some(Cow::Borrowed(request.server_name()?.as_bytes())),
            Self::Peer(kind) => text(request.peer_names(*kind)?),
        }
    }
}
