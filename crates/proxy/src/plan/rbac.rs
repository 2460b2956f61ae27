//! Role-based access control (`envoy.config.rbac.v3`): policies, and the decision about a request or a connection.
//!
//! The policies of a rule set are asked in the order of their names, and the first that matches decides. Most policies
//! can only match where some one thing has an exact value: one caller, one path, one port. [`Rules`] keeps those in a
//! table, so that a decision costs as many policies as could match, not as many as there are.

use std::{
    borrow::{Borrow, Cow},
    collections::HashMap,
    hash::{Hash, Hasher},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use foldhash::fast::RandomState;
use ipnet::IpNet;
use serde_json::Value;
use smallvec::SmallVec;

use super::{
    matcher::{HeaderMatcher, MetadataMatcher, StringMatcher, StringPattern},
    matcher_tree::Matcher,
    route_match::{RequestView, without_query},
    uri_template::UriTemplate,
};

/// The settings of an RBAC filter, HTTP or network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rbac {
    /// What is enforced; `None`: nothing.
    pub rules: Option<Engine>,
    /// What is only evaluated, into statistics and metadata.
    pub shadow_rules: Option<Engine>,
    /// Before the names of enforced statistics and metadata.
    pub rules_stat_prefix: Arc<str>,
    /// Before the names of shadow statistics and metadata.
    pub shadow_stat_prefix: Arc<str>,
    /// Counts each policy, too.
    pub per_rule_stats: bool,
    /// How long a refused connection is kept before it is closed; requests are answered at once.
    pub delay_deny: Option<Duration>,
}

/// What decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Engine {
    /// Policies.
    Rules(Rules),
    /// A tree of conditions. Where none fits nothing may pass.
    Matcher {
        /// The tree.
        tree: Matcher<Verdict>,
        /// One of its actions is to be noted.
        logs: bool,
    },
}

/// `envoy.config.rbac.v3.Action`: what a branch of a tree says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The name of the policy.
    pub name: Arc<str>,
    /// What it means.
    pub action: Action,
}

/// `envoy.config.rbac.v3.RBAC`.
#[derive(Debug, Clone)]
pub struct Rules {
    /// What a match means.
    pub action: Action,
    /// In the order of their names.
    policies: Vec<(Arc<str>, Policy)>,
    index: Index,
}

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Only what matches may pass.
    Allow,
    /// What matches may not pass.
    Deny,
    /// Everything passes; a match is noted.
    Log,
}

/// Somebody (one of the principals) doing something (one of the permissions).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What is done.
    pub permissions: Vec<Permission>,
    /// Who does it.
    pub principals: Vec<Principal>,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Permission {
    /// All of these.
    All(Vec<Permission>),
    /// One of these.
    Any(Vec<Permission>),
    /// Not this.
    Not(Box<Permission>),
    /// Everything.
    Anything,
    /// On a header.
    Header(HeaderMatcher),
    /// On the path, without its query.
    Path(StringMatcher),
    /// On the path, by segments.
    PathTemplate(UriTemplate),
    /// On the address that the client meant.
    DestinationIp(IpNet),
    /// On its port; both ends belong to it.
    DestinationPort(u16, u16),
    /// On the server name of the ClientHello.
    ServerName(StringMatcher),
    /// On metadata that an earlier filter left.
    Metadata(MetadataMatcher),
}

/// Who does it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// All of these.
    All(Vec<Principal>),
    /// One of these.
    Any(Vec<Principal>),
    /// Not this.
    Not(Box<Principal>),
    /// Everybody.
    Anybody,
    /// The name in the client's certificate; without a condition, any connection over TLS.
    Authenticated(Option<StringMatcher>),
    /// The peer of the connection, as a PROXY header names it.
    SourceIp(IpNet),
    /// The peer of the socket.
    DirectRemoteIp(IpNet),
    /// The client, as trusted headers name it.
    RemoteIp(IpNet),
    /// On a header.
    Header(HeaderMatcher),
    /// On the path, without its query.
    Path(StringMatcher),
    /// On metadata that an earlier filter left.
    Metadata(MetadataMatcher),
    /// On a text in the filter state.
    FilterState(Arc<str>, StringMatcher),
}

/// What a decision reads, beside the request.
pub trait Subject: RequestView {
    /// The peer of the socket.
    fn direct_remote(&self) -> Option<IpAddr>;

    /// The client: the source, or what trusted headers say.
    fn remote(&self) -> Option<IpAddr>;

    /// Names of the client's certificate: its URIs, its DNS names, its subject; `None` without TLS.
    fn names(&self) -> Option<impl Iterator<Item = &str>>;

    /// The path that policies are about: without query and fragment, and read as the routes read it. Where they ignore path
    /// parameters a policy that looked at them could be walked around.
    fn bare_path(&self) -> Cow<'_, [u8]> {
        without_query(self.path()).into()
    }
}

/// What came out of a rule set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision<'r> {
    /// Whether the rules let it pass.
    pub allowed: bool,
    /// The policy that matched.
    pub policy: Option<&'r Arc<str>>,
    /// Whether the access log is to have this one; `None` where nothing is said about that.
    pub logged: Option<bool>,
}

impl Engine {
    /// Decides.
    pub fn decide(&self, subject: &impl Subject) -> Decision<'_> {
        let (tree, logs) = match self {
            Self::Rules(rules) => return rules.decide(subject),
            Self::Matcher { tree, logs } => (tree, *logs),
        };
        let verdict = tree.find(subject);
        let action = verdict.map(|verdict| verdict.action);
        Decision {
            allowed: matches!(action, Some(Action::Allow | Action::Log)),
            policy: verdict.map(|verdict| &verdict.name),
            logged: logs.then_some(action == Some(Action::Log)),
        }
    }

    /// Whether everything passes, and only the log learns what was decided.
    pub fn only_logs(&self) -> bool {
        matches!(self, Self::Rules(rules) if rules.action == Action::Log)
    }
}

impl Rules {
    /// From named policies.
    pub fn new(action: Action, mut policies: Vec<(Arc<str>, Policy)>) -> Self {
        policies.sort_by(|a, b| a.0.cmp(&b.0));
        let index = Index::new(policies.iter().map(|(_, policy)| policy));
        Self {
            action,
            policies,
            index,
        }
    }

    /// The names of the policies, in order.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.policies.iter().map(|(name, _)| name)
    }

    /// Decides.
    pub fn decide(&self, subject: &impl Subject) -> Decision<'_> {
        let mut candidates: SmallVec<[u32; 32]> = SmallVec::new();
        self.index.candidates(subject, &mut candidates);
        let policy = candidates.into_iter().find_map(|index| {
            let (name, policy) = &self.policies[index as usize];
            policy.matches(subject).then_some(name)
        });
        Decision {
            allowed: match self.action {
                Action::Allow => policy.is_some(),
                Action::Deny => policy.is_none(),
                Action::Log => true,
            },
            policy,
            logged: (self.action == Action::Log).then_some(policy.is_some()),
        }
    }
}

/// The index follows from the policies.
impl PartialEq for Rules {
    fn eq(&self, other: &Self) -> bool {
        self.action == other.action && self.policies == other.policies
    }
}

impl Eq for Rules {}

impl Policy {
    /// Whether it is about the subject.
    pub fn matches(&self, subject: &impl Subject) -> bool {
        self.permissions.iter().any(|p| p.matches(subject))
            && self.principals.iter().any(|p| p.matches(subject))
    }
}

impl Permission {
    fn matches(&self, subject: &impl Subject) -> bool {
        match self {
            Self::All(all) => all.iter().all(|p| p.matches(subject)),
            Self::Any(any) => any.iter().any(|p| p.matches(subject)),
            Self::Not(not) => !not.matches(subject),
            Self::Anything => true,
            Self::Header(matcher) => matcher.matches(subject),
            Self::Path(matcher) => matcher.matches(&subject.bare_path()),
            Self::PathTemplate(template) => template.is_match(&subject.bare_path()),
            Self::DestinationIp(net) => holds(net, subject.destination().map(|a| a.ip())),
            Self::DestinationPort(first, last) => subject
                .destination()
                .is_some_and(|a| (*first..=*last).contains(&a.port())),
            // A connection without a server name has an empty one.
            Self::ServerName(matcher) => {
                matcher.matches(subject.server_name().unwrap_or_default().as_bytes())
            }
            Self::Metadata(matcher) => metadata(matcher, subject),
        }
    }
}

impl Principal {
    fn matches(&self, subject: &impl Subject) -> bool {
        match self {
            Self::All(all) => all.iter().all(|p| p.matches(subject)),
            Self::Any(any) => any.iter().any(|p| p.matches(subject)),
            Self::Not(not) => !not.matches(subject),
            Self::Anybody => true,
            Self::Authenticated(None) => subject.names().is_some(),
            Self::Authenticated(Some(matcher)) => subject
                .names()
                .is_some_and(|mut names| names.any(|name| matcher.matches(name.as_bytes()))),
            Self::SourceIp(net) => holds(net, subject.source().map(|a| a.ip())),
            Self::DirectRemoteIp(net) => holds(net, subject.direct_remote()),
            Self::RemoteIp(net) => holds(net, subject.remote()),
            Self::Header(matcher) => matcher.matches(subject),
            Self::Path(matcher) => matcher.matches(&subject.bare_path()),
            Self::Metadata(matcher) => metadata(matcher, subject),
            Self::FilterState(key, matcher) => subject
                .filter_state(key)
                .and_then(Value::as_str)
                .is_some_and(|text| matcher.matches(text.as_bytes())),
        }
    }
}

fn metadata(matcher: &MetadataMatcher, subject: &impl Subject) -> bool {
    let root = subject.dynamic_metadata(&matcher.filter);
    let value = root.and_then(|root| {
        let mut keys = matcher.path.iter();
        keys.try_fold(root, |at: &Value, key| at.get(&**key))
    });
    matcher.matches(value)
}

/// Policies speak of addresses as the user knows them, so a mapped IPv4 address is an IPv4 address.
fn holds(net: &IpNet, ip: Option<IpAddr>) -> bool {
    ip.is_some_and(|ip| net.contains(&ip.to_canonical()))
}

/// Policies by an exact value without which they cannot match.
#[derive(Debug, Clone, Default)]
struct Index {
    by_key: HashMap<Key, Vec<u32>, RandomState>,
    /// Policies without such a value.
    always: Vec<u32>,
}

/// One exact value.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    Name(Box<[u8]>),
    Path(Box<[u8]>),
    Port(u16),
}

impl Index {
    fn new<'p>(policies: impl Iterator<Item = &'p Policy>) -> Self {
        let mut out = Self::default();
        for (number, policy) in (0..).zip(policies) {
            // The caller tells most, then the path: one port serves all.
            let keys = needed(&policy.principals, &Principal::names)
                .or_else(|| needed(&policy.permissions, &Permission::paths))
                .or_else(|| needed(&policy.permissions, &Permission::ports));
            match keys {
                Some(keys) => keys.into_iter().for_each(|key| {
                    let numbers = out.by_key.entry(key).or_default();
                    if numbers.last() != Some(&number) {
                        numbers.push(number);
                    }
                }),
                None => out.always.push(number),
            }
        }
        out
    }

    /// The policies that could match, in order.
    fn candidates(&self, subject: &impl Subject, out: &mut SmallVec<[u32; 32]>) {
        out.extend_from_slice(&self.always);
        if self.by_key.is_empty() {
            return;
        }
        let mut add = |key: KeyRef<'_>| {
            if let Some(numbers) = self.by_key.get(&key as &dyn AsKey) {
                out.extend_from_slice(numbers);
            }
        };
        for name in subject.names().into_iter().flatten() {
            add(KeyRef::Name(name.as_bytes()));
        }
        add(KeyRef::Path(&subject.bare_path()));
        if let Some(meant) = subject.destination() {
            add(KeyRef::Port(meant.port()));
        }
        out.sort_unstable();
        out.dedup();
    }
}

/// The values of which each of the alternatives needs one; `None` where some alternative can do without.
fn needed<T>(alternatives: &[T], of: &impl Fn(&T) -> Option<Vec<Key>>) -> Option<Vec<Key>> {
    let all: Option<Vec<Vec<Key>>> = alternatives.iter().map(of).collect();
    Some(all?.into_iter().flatten().collect())
}

impl Principal {
    fn names(&self) -> Option<Vec<Key>> {
        match self {
            Self::All(all) => all.iter().find_map(Self::names),
            Self::Any(any) => needed(any, &Self::names),
            Self::Authenticated(Some(matcher)) => exact(matcher).map(|v| vec![Key::Name(v)]),
            _ => None,
        }
    }
}

impl Permission {
    fn paths(&self) -> Option<Vec<Key>> {
        match self {
            Self::All(all) => all.iter().find_map(Self::paths),
            Self::Any(any) => needed(any, &Self::paths),
            Self::Path(matcher) => exact(matcher).map(|v| vec![Key::Path(v)]),
            _ => None,
        }
    }

    fn ports(&self) -> Option<Vec<Key>> {
        match self {
            Self::All(all) => all.iter().find_map(Self::ports),
            Self::Any(any) => needed(any, &Self::ports),
            Self::DestinationPort(first, last) if first == last => Some(vec![Key::Port(*first)]),
            _ => None,
        }
    }
}

fn exact(matcher: &StringMatcher) -> Option<Box<[u8]>> {
    match &matcher.pattern {
        StringPattern::Exact(text) if !matcher.ignore_case => Some(text.as_bytes().into()),
        _ => None,
    }
}

/// A key that is looked up without being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum KeyRef<'a> {
    Name(&'a [u8]),
    Path(&'a [u8]),
    Port(u16),
}

trait AsKey {
    fn key(&self) -> KeyRef<'_>;
}

impl AsKey for Key {
    fn key(&self) -> KeyRef<'_> {
        match self {
            Self::Name(value) => KeyRef::Name(value),
            Self::Path(value) => KeyRef::Path(value),
            Self::Port(port) => KeyRef::Port(*port),
        }
    }
}

impl AsKey for KeyRef<'_> {
    fn key(&self) -> KeyRef<'_> {
        *self
    }
}

/// The same as of what it is looked up by.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl<'a> Borrow<dyn AsKey + 'a> for Key {
    fn borrow(&self) -> &(dyn AsKey + 'a) {
        self
    }
}

impl Hash for dyn AsKey + '_ {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialEq for dyn AsKey + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for dyn AsKey + '_ {}

#[cfg(test)]
mod tests;
