//! Rate limits of routes: which descriptors a request has.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde_json::Value;

use super::{
    cel::Expr,
    format::Template,
    matcher::{AddressMatcher, HeaderMatcher, QueryMatcher, query_parameter},
    metadata::Metadata,
    route_match::RequestView,
};

/// `envoy.config.route.v3.RateLimit`: one descriptor, where all of its actions give an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateLimit {
    /// Only filters of this stage ask for it.
    pub stage: u32,
    /// In the order of the entries.
    pub actions: Vec<RateLimitAction>,
    /// Replaces the service's limit.
    pub limit: Option<LimitOverride>,
    /// What a request counts, where it is not one.
    pub hits_addend: Option<HitsAddend>,
    /// The hits are given back instead of taken.
    pub negative_hits: bool,
    /// Asked when the request is over; then nothing waits for the answer.
    pub apply_on_stream_done: bool,
    /// Whether x-ratelimit headers tell of the descriptor; `None` as the filter says.
    pub ratelimit_headers: Option<bool>,
}

/// `RateLimit.Override`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LimitOverride {
    /// Always this.
    Fixed(Limit),
    /// Where dynamic metadata may hold it (`requests_per_unit`, `unit`).
    Metadata(MetadataKey),
}

/// So many requests in a unit of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Requests.
    pub requests: u32,
    /// Name of an `envoy.type.v3.RateLimitUnit`.
    pub unit: Arc<str>,
    /// How many of them, where it is not one.
    pub units: Option<u32>,
}

/// `RateLimit.HitsAddend`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HitsAddend {
    /// Always this.
    Number(u64),
    /// A number after substitution, from 0 to [`MOST_HITS`].
    Format(Template),
}

/// What a request may count at most.
pub const MOST_HITS: u64 = 1_000_000_000;

/// A place in metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataKey {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Keys from its root.
    pub path: Vec<Arc<str>>,
}

/// `RateLimit.Action`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RateLimitAction {
    /// `source_cluster`: our own cluster (`--service-cluster`).
    SourceCluster,
    /// `destination_cluster`: the route's cluster.
    DestinationCluster,
    /// A header's value.
    RequestHeader {
        /// Lower case.
        header: Arc<str>,
        /// Key of the entry.
        key: Arc<str>,
        /// Without the header the entry is left out instead of the descriptor.
        skip_if_absent: bool,
    },
    /// A query parameter's value.
    QueryParameter {
        /// Name.
        parameter: Arc<str>,
        /// Key of the entry.
        key: Arc<str>,
        /// Without the parameter the entry is left out instead of the descriptor.
        skip_if_absent: bool,
    },
    /// The client's address.
    RemoteAddress,
    /// The client's network.
    MaskedRemoteAddress {
        /// Prefix length of IPv4.
        v4: u8,
        /// Prefix length of IPv6.
        v6: u8,
    },
    /// A fixed entry.
    GenericKey {
        /// Key of the entry.
        key: Arc<str>,
        /// Value of the entry.
        value: DescriptorValue,
        /// Where the value is empty; empty for none.
        default: Arc<str>,
    },
    /// A fixed entry for requests whose headers match, or do not.
    HeaderValueMatch {
        /// Key of the entry.
        key: Arc<str>,
        /// Value of the entry.
        value: DescriptorValue,
        /// Where the value is empty; empty for none.
        default: Arc<str>,
        /// Whether the headers shall match.
        expect: bool,
        /// All of them.
        headers: Vec<HeaderMatcher>,
    },
    /// A fixed entry for requests whose query matches, or does not.
    QueryParameterValueMatch {
        /// Key of the entry.
        key: Arc<str>,
        /// Value of the entry.
        value: DescriptorValue,
        /// Where the value is empty; empty for none.
        default: Arc<str>,
        /// Whether the parameters shall match.
        expect: bool,
        /// All of them.
        parameters: Vec<QueryMatcher>,
    },
    /// A fixed entry for clients of some networks.
    RemoteAddressMatch {
        /// Key of the entry.
        key: Arc<str>,
        /// Value of the entry.
        value: Template,
        /// Where the value is empty; empty for none.
        default: Arc<str>,
        /// The networks.
        addresses: AddressMatcher,
    },
    /// What an expression comes to (`envoy.rate_limit_descriptors.expr`).
    Expression {
        /// Key of the entry.
        key: Arc<str>,
        /// Its value.
        expression: Box<Expr>,
        /// Without a value the entry is left out instead of the descriptor.
        skip_if_error: bool,
    },
    /// A text in metadata.
    Metadata {
        /// Key of the entry.
        key: Arc<str>,
        /// Where it stands.
        at: MetadataKey,
        /// The route's metadata instead of the request's.
        of_route: bool,
        /// Where there is none; empty for no default.
        default: Arc<str>,
        /// Without a value the entry is left out instead of the descriptor.
        skip_if_absent: bool,
    },
}

/// A `descriptor_value`: a format where the switch [`FORMAT_SWITCH`] is on, as in Envoy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescriptorValue {
    /// As it is written.
    pub text: Arc<str>,
    /// The format, where it is one that says anything else than the text.
    pub format: Option<Template>,
}

/// Envoy's runtime switch; off by default.
pub const FORMAT_SWITCH: &str =
    "envoy.reloadable_features.enable_formatter_for_ratelimit_action_descriptor_value";

/// What a limit is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Keys and values.
    pub entries: Vec<(Arc<str>, String)>,
    /// Replaces the service's limit.
    pub limit: Option<Limit>,
    /// What the request counts.
    pub hits_addend: Option<u64>,
    /// It is given back instead of taken.
    pub negative_hits: bool,
    /// Whether x-ratelimit headers tell of it; `None` as the filter says.
    pub ratelimit_headers: Option<bool>,
}

/// What descriptors are made of besides the request.
pub trait RateLimitContext {
    /// `--service-cluster`.
    fn service_cluster(&self) -> &str;
    /// The cluster that the route names.
    fn route_cluster(&self) -> Option<&str>;
    /// The client.
    fn client(&self) -> Option<IpAddr>;
    /// Metadata of the route.
    fn route_metadata(&self) -> Option<&Metadata>;
    /// Whether [`FORMAT_SWITCH`] is on.
    fn formats_values(&self) -> bool;
    /// The text of a format.
    fn format(&self, template: &Template) -> String;
    /// The value of an expression as text; `None` where it has none.
    fn expression(&self, expression: &Expr) -> Option<String>;
}

impl RateLimit {
    /// The descriptor of a request; `None` where one of the actions has nothing to say. Without entries where all of them
    /// may be left out and are.
    pub fn descriptor(
        &self,
        request: &(impl RequestView + ?Sized),
        context: &impl RateLimitContext,
    ) -> Option<Descriptor> {
        let mut descriptor = Descriptor::default();
        for action in &self.actions {
            match action.entry(request, context) {
                Entry::Some(key, value) => descriptor.entries.push((key, value)),
                Entry::Skip => {}
                Entry::None => return None,
            }
        }
        descriptor.limit = match &self.limit {
            None => None,
            Some(LimitOverride::Fixed(limit)) => Some(limit.clone()),
            Some(LimitOverride::Metadata(at)) => at
                .value(request.dynamic_metadata(&at.namespace))
                .and_then(Limit::of_metadata),
        };
        descriptor.hits_addend = match &self.hits_addend {
            None => None,
            Some(HitsAddend::Number(number)) => Some(*number),
            // Envoy leaves a request uncounted whose addend is no number.
            Some(HitsAddend::Format(template)) => Some(hits(&context.format(template))?),
        };
        descriptor.negative_hits = self.negative_hits;
        descriptor.ratelimit_headers = self.ratelimit_headers;
        Some(descriptor)
    }
}

/// The number that a text stands for; a fraction is cut off.
fn hits(text: &str) -> Option<u64> {
    let number: f64 = text.trim().parse().ok()?;
    (0.0..=MOST_HITS as f64)
        .contains(&number)
        .then_some(number as u64)
}

impl Limit {
    /// `requests_per_unit` and `unit` of a structure.
    fn of_metadata(value: &Value) -> Option<Self> {
        let requests = value.get("requests_per_unit")?.as_f64()?;
        let unit = value.get("unit")?.as_str()?;
        (0.0..=f64::from(u32::MAX))
            .contains(&requests)
            .then(|| Self {
                requests: requests as u32,
                unit: unit.into(),
                units: None,
            })
    }
}

enum Entry {
    Some(Arc<str>, String),
    /// The descriptor goes without.
    Skip,
    /// There is no descriptor.
    None,
}

/// An entry with a value that may be a format.
fn valued(
    key: &Arc<str>,
    value: &DescriptorValue,
    default: &str,
    context: &impl RateLimitContext,
) -> Entry {
    match &value.format {
        Some(format) if context.formats_values() => filled(key, format, default, context),
        _ => Entry::Some(key.clone(), value.text.to_string()),
    }
}

/// An entry with a value that a format makes; without one there is no descriptor.
fn filled(
    key: &Arc<str>,
    value: &Template,
    default: &str,
    context: &impl RateLimitContext,
) -> Entry {
    match context.format(value) {
        text if !text.is_empty() => Entry::Some(key.clone(), text),
        _ if !default.is_empty() => Entry::Some(key.clone(), default.to_owned()),
        _ => Entry::None,
    }
}

impl RateLimitAction {
    fn entry(
        &self,
        request: &(impl RequestView + ?Sized),
        context: &impl RateLimitContext,
    ) -> Entry {
        let absent = |skip: bool| if skip { Entry::Skip } else { Entry::None };
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        match self {
            Self::SourceCluster => Entry::Some(
                "source_cluster".into(),
                context.service_cluster().to_owned(),
            ),
            Self::DestinationCluster => match context.route_cluster() {
                Some(name) => Entry::Some("destination_cluster".into(), name.to_owned()),
                None => Entry::None,
            },
            Self::RequestHeader {
                header,
                key,
                skip_if_absent,
            } => match request.header(header) {
                Some(value) => Entry::Some(key.clone(), text(&value)),
                None => absent(*skip_if_absent),
            },
            Self::QueryParameter {
                parameter,
                key,
                skip_if_absent,
            } => match query_parameter(request.path(), parameter.as_bytes()) {
                Some(value) => Entry::Some(key.clone(), text(value)),
                None => absent(*skip_if_absent),
            },
            Self::RemoteAddress => match context.client() {
                Some(ip) => Entry::Some("remote_address".into(), ip.to_string()),
                None => Entry::None,
            },
            Self::MaskedRemoteAddress { v4, v6 } => {
                let length = |ip: &IpAddr| if ip.is_ipv4() { *v4 } else { *v6 };
                let net = context
                    .client()
                    .and_then(|ip| IpNet::new(ip, length(&ip)).ok());
                match net {
                    Some(net) => {
                        Entry::Some("masked_remote_address".into(), net.trunc().to_string())
                    }
                    None => Entry::None,
                }
            }
            Self::GenericKey {
                key,
                value,
                default,
            } => valued(key, value, default, context),
            Self::HeaderValueMatch {
                key,
                value,
                default,
                expect,
                headers,
            } => match headers.iter().all(|h| h.matches(request)) == *expect {
                true => valued(key, value, default, context),
                false => Entry::None,
            },
            Self::QueryParameterValueMatch {
                key,
                value,
                default,
                expect,
                parameters,
            } => match parameters.iter().all(|p| p.matches(request.path())) == *expect {
                true => valued(key, value, default, context),
                false => Entry::None,
            },
            Self::RemoteAddressMatch {
                key,
                value,
                default,
                addresses,
            } => match context.client().is_some_and(|ip| addresses.matches(ip)) {
                true => filled(key, value, default, context),
                false => Entry::None,
            },
            Self::Expression {
                key,
                expression,
                skip_if_error,
            } => match context.expression(expression) {
                Some(value) => Entry::Some(key.clone(), value),
                None => absent(*skip_if_error),
            },
            Self::Metadata {
                key,
                at,
                of_route,
                default,
                skip_if_absent,
            } => {
                let root = match of_route {
                    true => context
                        .route_metadata()
                        .and_then(|m| m.namespace(&at.namespace)),
                    false => request.dynamic_metadata(&at.namespace),
                };
                match at.value(root).and_then(Value::as_str) {
                    Some(value) if !value.is_empty() => Entry::Some(key.clone(), value.to_owned()),
                    _ if !default.is_empty() => Entry::Some(key.clone(), default.to_string()),
                    _ => absent(*skip_if_absent),
                }
            }
        }
    }
}

impl MetadataKey {
    fn value<'v>(&self, root: Option<&'v Value>) -> Option<&'v Value> {
        self.path.iter().try_fold(root?, |v, key| v.get(&**key))
    }
}
