//! HTTPRoute, GRPCRoute, TLSRoute and TCPRoute.

use serde::Deserialize;
use serde_json::Value;

use crate::object::null_as_default;

/// What a route attaches to: a Gateway's listeners, or a Service (the mesh).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ParentReference {
    /// As written; Gateway API's where it is left out.
    #[serde(default)]
    pub group: Option<String>,
    /// As written; `Gateway` where it is left out.
    #[serde(default)]
    pub kind: Option<String>,
    /// The route's own where it is left out.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// One listener (or port of a Service) by name.
    #[serde(default)]
    pub section_name: Option<String>,
    /// Listeners of one port, or one port of a Service.
    #[serde(default)]
    pub port: Option<u32>,
}

impl ParentReference {
    /// Its group, with the default.
    pub fn group(&self) -> &str {
        self.group.as_deref().unwrap_or(super::GROUP)
    }

    /// Its kind, with the default.
    pub fn kind(&self) -> &str {
        self.kind.as_deref().unwrap_or("Gateway")
    }
}

/// `spec` of an HTTPRoute.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpRoute {
    /// What it attaches to.
    #[serde(default, deserialize_with = "null_as_default")]
    pub parent_refs: Vec<ParentReference>,
    /// `All` or `None`; not acted upon.
    #[serde(default)]
    pub use_default_gateways: Option<String>,
    /// For which hosts; those of the listeners where there are none.
    #[serde(default, deserialize_with = "null_as_default")]
    pub hostnames: Vec<String>,
    /// What becomes of requests. Without any, one that matches everything.
    #[serde(default = "http_rules")]
    pub rules: Vec<HttpRule>,
}

fn http_rules() -> Vec<HttpRule> {
    vec![HttpRule {
        matches: any_path(),
        ..HttpRule::default()
    }]
}

fn any_path() -> Vec<HttpMatch> {
    vec![HttpMatch::default()]
}

/// A rule of an HTTPRoute.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpRule {
    /// A name for people and statistics.
    #[serde(default)]
    pub name: Option<String>,
    /// One of these has to fit.
    #[serde(default = "any_path")]
    pub matches: Vec<HttpMatch>,
    /// What is done to the request.
    #[serde(default, deserialize_with = "null_as_default")]
    pub filters: Vec<Filter>,
    /// Where it goes.
    #[serde(default, deserialize_with = "null_as_default")]
    pub backend_refs: Vec<HttpBackendRef>,
    /// How long it may take.
    #[serde(default)]
    pub timeouts: Option<Timeouts>,
    /// When it is tried again.
    #[serde(default)]
    pub retry: Option<Retry>,
    /// Not acted upon.
    #[serde(default)]
    pub session_persistence: Option<Value>,
}

/// What a request has to look like.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpMatch {
    /// Every path, where it is left out.
    #[serde(deserialize_with = "null_as_default")]
    pub path: PathMatch,
    /// All of these headers.
    #[serde(deserialize_with = "null_as_default")]
    pub headers: Vec<HeaderMatch>,
    /// All of these parameters.
    #[serde(deserialize_with = "null_as_default")]
    pub query_params: Vec<HeaderMatch>,
    /// e.g. `GET`.
    pub method: Option<String>,
}

/// `path` of a match.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PathMatch {
    /// How it is compared.
    #[serde(rename = "type")]
    pub kind: PathMatchType,
    /// With what.
    pub value: String,
}

impl Default for PathMatch {
    fn default() -> Self {
        PathMatch {
            kind: PathMatchType::PathPrefix,
            value: "/".to_owned(),
        }
    }
}

/// How paths are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum PathMatchType {
    /// The whole path.
    Exact,
    /// Whole segments from the beginning.
    #[default]
    PathPrefix,
    /// RE2.
    RegularExpression,
}

/// A header or query parameter of a match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HeaderMatch {
    /// How it is compared.
    #[serde(rename = "type")]
    pub kind: MatchType,
    /// Its name.
    pub name: String,
    /// With what it is compared.
    pub value: String,
}

/// How texts are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum MatchType {
    /// As they stand.
    #[default]
    Exact,
    /// RE2.
    RegularExpression,
}

/// A filter of a rule or of a backend.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Filter {
    /// Which of the following is given.
    #[serde(rename = "type")]
    pub kind: FilterType,
    /// Headers on the way to the backend.
    #[serde(default)]
    pub request_header_modifier: Option<HeaderFilter>,
    /// Headers on the way back.
    #[serde(default)]
    pub response_header_modifier: Option<HeaderFilter>,
    /// A second backend that gets a copy.
    #[serde(default)]
    pub request_mirror: Option<Mirror>,
    /// An answer that sends the client elsewhere.
    #[serde(default)]
    pub request_redirect: Option<Redirect>,
    /// Another path or host for the backend.
    #[serde(default)]
    pub url_rewrite: Option<UrlRewrite>,
    /// Who of other origins may ask.
    #[serde(default)]
    pub cors: Option<Cors>,
    /// Not acted upon: the route is not accepted.
    #[serde(default)]
    pub external_auth: Option<Value>,
    /// Not acted upon: the route is not accepted.
    #[serde(default)]
    pub extension_ref: Option<super::LocalReference>,
}

/// `type` of a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[allow(missing_docs)]
pub enum FilterType {
    RequestHeaderModifier,
    ResponseHeaderModifier,
    RequestMirror,
    RequestRedirect,
    #[serde(rename = "URLRewrite")]
    UrlRewrite,
    #[serde(rename = "CORS")]
    Cors,
    ExternalAuth,
    ExtensionRef,
}

impl FilterType {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            FilterType::RequestHeaderModifier => "RequestHeaderModifier",
            FilterType::ResponseHeaderModifier => "ResponseHeaderModifier",
            FilterType::RequestMirror => "RequestMirror",
            FilterType::RequestRedirect => "RequestRedirect",
            FilterType::UrlRewrite => "URLRewrite",
            FilterType::Cors => "CORS",
            FilterType::ExternalAuth => "ExternalAuth",
            FilterType::ExtensionRef => "ExtensionRef",
        }
    }
}

/// Changes of headers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HeaderFilter {
    /// Over what is there.
    #[serde(deserialize_with = "null_as_default")]
    pub set: Vec<NameValue>,
    /// Beside what is there.
    #[serde(deserialize_with = "null_as_default")]
    pub add: Vec<NameValue>,
    /// Away.
    #[serde(deserialize_with = "null_as_default")]
    pub remove: Vec<String>,
}

/// A header and its value.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NameValue {
    /// In any case.
    pub name: String,
    /// As it is sent.
    pub value: String,
}

/// `requestMirror`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Mirror {
    /// Where copies go.
    pub backend_ref: BackendRef,
    /// How many of a hundred; all where neither is given.
    pub percent: Option<u32>,
    /// The same as a fraction.
    pub fraction: Option<Fraction>,
}

/// A share of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Fraction {
    /// So many …
    pub numerator: u32,
    /// … of so many; 100 where it is left out.
    #[serde(default = "hundred")]
    pub denominator: u32,
}

fn hundred() -> u32 {
    100
}

/// `requestRedirect`. Parts that are left out are those of the request.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Redirect {
    /// `http` or `https`.
    #[serde(default)]
    pub scheme: Option<String>,
    /// The host.
    #[serde(default)]
    pub hostname: Option<String>,
    /// The path.
    #[serde(default)]
    pub path: Option<PathModifier>,
    /// The port.
    #[serde(default)]
    pub port: Option<u32>,
    /// 301, 302, 303, 307 or 308.
    #[serde(default = "found")]
    pub status_code: u32,
}

fn found() -> u32 {
    302
}

/// `urlRewrite`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct UrlRewrite {
    /// The new `Host`.
    pub hostname: Option<String>,
    /// The new path.
    pub path: Option<PathModifier>,
}

/// A new path.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PathModifier {
    /// Which of the two is given.
    #[serde(rename = "type")]
    pub kind: PathModifierType,
    /// In place of the whole path.
    #[serde(default)]
    pub replace_full_path: Option<String>,
    /// In place of the prefix that matched.
    #[serde(default)]
    pub replace_prefix_match: Option<String>,
}

/// `type` of a [`PathModifier`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[allow(missing_docs)]
pub enum PathModifierType {
    ReplaceFullPath,
    ReplacePrefixMatch,
}

/// `cors`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cors {
    /// `scheme://host(:port)`, `*`, or with one wildcard.
    #[serde(deserialize_with = "null_as_default")]
    pub allow_origins: Vec<String>,
    /// Whether cookies and such may come along.
    pub allow_credentials: Option<bool>,
    /// Methods.
    #[serde(deserialize_with = "null_as_default")]
    pub allow_methods: Vec<String>,
    /// Headers of requests.
    #[serde(deserialize_with = "null_as_default")]
    pub allow_headers: Vec<String>,
    /// Headers of answers that scripts may see.
    #[serde(deserialize_with = "null_as_default")]
    pub expose_headers: Vec<String>,
    /// Seconds that an answer may be kept.
    pub max_age: u32,
}

impl Default for Cors {
    fn default() -> Self {
        Cors {
            allow_origins: Vec::new(),
            allow_credentials: None,
            allow_methods: Vec::new(),
            allow_headers: Vec::new(),
            expose_headers: Vec::new(),
            max_age: 5,
        }
    }
}

/// `timeouts` of a rule, as written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Timeouts {
    /// The whole request; `0s` means none.
    pub request: Option<String>,
    /// One attempt.
    pub backend_request: Option<String>,
}

/// `retry` of a rule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Retry {
    /// Answers that are tried again, beside failed connections.
    #[serde(deserialize_with = "null_as_default")]
    pub codes: Vec<u32>,
    /// How often; 2 where it is left out.
    pub attempts: Option<u32>,
    /// The least time between two attempts.
    pub backoff: Option<String>,
}

/// A backend and its share.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BackendRef {
    /// Empty for the core group.
    pub group: String,
    /// `Service` where it is left out.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// The route's own where it is left out.
    pub namespace: Option<String>,
    /// The service's port.
    pub port: Option<u32>,
    /// Its share beside the other backends of the rule.
    pub weight: u32,
}

impl Default for BackendRef {
    fn default() -> Self {
        BackendRef {
            group: String::new(),
            kind: "Service".to_owned(),
            name: String::new(),
            namespace: None,
            port: None,
            weight: 1,
        }
    }
}

/// A backend of an HTTPRoute or GRPCRoute.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HttpBackendRef {
    /// Empty for the core group.
    pub group: String,
    /// `Service` where it is left out.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// The route's own where it is left out.
    pub namespace: Option<String>,
    /// The service's port.
    pub port: Option<u32>,
    /// Its share beside the other backends of the rule.
    pub weight: u32,
    /// Only for requests that go there.
    #[serde(deserialize_with = "null_as_default")]
    pub filters: Vec<Filter>,
}

impl Default for HttpBackendRef {
    fn default() -> Self {
        let BackendRef {
            group, kind, name, ..
        } = BackendRef::default();
        HttpBackendRef {
            group,
            kind,
            name,
            namespace: None,
            port: None,
            weight: 1,
            filters: Vec::new(),
        }
    }
}

impl HttpBackendRef {
    /// Without its filters. (serde cannot both flatten and refuse unknown fields.)
    pub fn backend(&self) -> BackendRef {
        BackendRef {
            group: self.group.clone(),
            kind: self.kind.clone(),
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            port: self.port,
            weight: self.weight,
        }
    }
}

/// `spec` of a GRPCRoute.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrpcRoute {
    /// What it attaches to.
    #[serde(deserialize_with = "null_as_default")]
    pub parent_refs: Vec<ParentReference>,
    /// `All` or `None`; not acted upon.
    pub use_default_gateways: Option<String>,
    /// For which hosts; those of the listeners where there are none.
    #[serde(deserialize_with = "null_as_default")]
    pub hostnames: Vec<String>,
    /// What becomes of calls.
    #[serde(deserialize_with = "null_as_default")]
    pub rules: Vec<GrpcRule>,
}

/// A rule of a GRPCRoute.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrpcRule {
    /// A name for people and statistics.
    pub name: Option<String>,
    /// One of these has to fit; none fits everything.
    #[serde(deserialize_with = "null_as_default")]
    pub matches: Vec<GrpcMatch>,
    /// What is done to the call.
    #[serde(deserialize_with = "null_as_default")]
    pub filters: Vec<Filter>,
    /// Where it goes.
    #[serde(deserialize_with = "null_as_default")]
    pub backend_refs: Vec<HttpBackendRef>,
    /// Not acted upon.
    pub session_persistence: Option<Value>,
}

/// What a call has to look like.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrpcMatch {
    /// Service and method.
    pub method: Option<GrpcMethodMatch>,
    /// All of these headers.
    #[serde(deserialize_with = "null_as_default")]
    pub headers: Vec<HeaderMatch>,
}

/// `method` of a match: one of the two at least.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrpcMethodMatch {
    /// How they are compared.
    #[serde(rename = "type")]
    pub kind: MatchType,
    /// `package.Service`.
    pub service: Option<String>,
    /// The method.
    pub method: Option<String>,
}

/// `spec` of a TLSRoute.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TlsRoute {
    /// What it attaches to.
    #[serde(deserialize_with = "null_as_default")]
    pub parent_refs: Vec<ParentReference>,
    /// `All` or `None`; not acted upon.
    pub use_default_gateways: Option<String>,
    /// For which SNI; all where there are none.
    #[serde(deserialize_with = "null_as_default")]
    pub hostnames: Vec<String>,
    /// Where connections go.
    #[serde(deserialize_with = "null_as_default")]
    pub rules: Vec<L4Rule>,
}

/// `spec` of a TCPRoute.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TcpRoute {
    /// What it attaches to.
    #[serde(deserialize_with = "null_as_default")]
    pub parent_refs: Vec<ParentReference>,
    /// `All` or `None`; not acted upon.
    pub use_default_gateways: Option<String>,
    /// Where connections go.
    #[serde(deserialize_with = "null_as_default")]
    pub rules: Vec<L4Rule>,
}

/// A rule of a TLSRoute or TCPRoute.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct L4Rule {
    /// A name for people and statistics.
    pub name: Option<String>,
    /// Where connections go.
    #[serde(deserialize_with = "null_as_default")]
    pub backend_refs: Vec<BackendRef>,
}

pub(super) fn own_group() -> String {
    super::GROUP.to_owned()
}
