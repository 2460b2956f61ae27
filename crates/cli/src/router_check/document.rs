//! The document of tests: `envoy.RouterCheckToolSchema.Validation`, and the older form without a schema.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, anyhow, bail};
use proxy::{plan::HeaderMatcher, router::check::Request};
use serde::Deserialize;
use serde_json::Value;

use super::text_format;

/// One test.
#[derive(Debug)]
pub(super) struct Test {
    pub(super) name: String,
    pub(super) input: Request,
    /// At least one.
    pub(super) assertions: Vec<Assertion>,
}

/// What a test expects. Empty texts expect that there is no such thing.
#[derive(Debug)]
pub(super) enum Assertion {
    ClusterName(String),
    VirtualClusterName(String),
    VirtualHostName(String),
    PathRewrite(String),
    HostRewrite(String),
    PathRedirect(String),
    CodeRedirect(u16),
    Timeout(Duration),
    RouteMetadata {
        namespace: String,
        key: String,
        value: String,
    },
    /// A header's first value; empty where there is no such header, too.
    RequestHeaderField {
        name: String,
        value: String,
    },
    ResponseHeaderField {
        name: String,
        value: String,
    },
    /// `text` is the matcher as it was written.
    RequestHeader {
        matcher: HeaderMatcher,
        text: String,
    },
    ResponseHeader {
        matcher: HeaderMatcher,
        text: String,
    },
}

/// How a document is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// JSON, with trailing commas too, or YAML.
    Yaml,
    /// Protobuf's text format.
    ProtobufText,
}

/// Reads a document.
pub(super) fn read(text: &str, format: Format) -> anyhow::Result<Vec<Test>> {
    let value: Value = match (format, serde_json::from_str(text)) {
        (Format::ProtobufText, _) => text_format::read(text)?,
        (Format::Yaml, Ok(value)) => value,
        (Format::Yaml, Err(_)) => proto::json::yaml_to_value(text).map_err(|e| anyhow!("{e}"))?,
    };
    let tests: Vec<ValidationItem> = match value {
        list @ Value::Array(_) => serde_json::from_value(list)?,
        object => serde_json::from_value::<Validation>(object)?.tests,
    };
    if tests.is_empty() {
        bail!("tests: needs at least one test");
    }
    tests
        .into_iter()
        .enumerate()
        .map(|(index, test)| {
            let place = format!("tests[{index}] `{}`", test.test_name);
            test.convert().context(place)
        })
        .collect()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Validation {
    tests: Vec<ValidationItem>,
    /// Runtime of the whole run. Nothing that a test sees reads it: a regular expression has a limit of its own here,
    /// and keys of routes are on by each test's `runtime`.
    #[serde(default, rename = "runtime")]
    _runtime: Value,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ValidationItem {
    #[serde(alias = "testName")]
    test_name: String,
    input: ValidationInput,
    validate: ValidationAssert,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ValidationInput {
    #[serde(alias = ":authority")]
    authority: String,
    #[serde(alias = ":path")]
    path: String,
    #[serde(alias = ":method", default)]
    method: Option<String>,
    #[serde(alias = "randomValue", default)]
    random_value: Number,
    #[serde(default)]
    ssl: bool,
    #[serde(default)]
    internal: bool,
    #[serde(default)]
    runtime: String,
    #[serde(
        alias = "additionalRequestHeaders",
        alias = "additional_headers",
        default
    )]
    additional_request_headers: Vec<HeaderValue>,
    #[serde(alias = "additionalResponseHeaders", default)]
    additional_response_headers: Vec<HeaderValue>,
    #[serde(alias = "dynamicMetadata", default)]
    dynamic_metadata: Vec<DynamicMetadata>,
}

/// A whole number; protobuf's JSON writes those of 64 bits as texts.
#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum Number {
    #[default]
    Absent,
    Whole(u64),
    Text(String),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderValue {
    #[serde(alias = "field")]
    key: String,
    #[serde(default)]
    value: String,
}

/// `envoy.extensions.filters.http.set_metadata.v3.Metadata`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DynamicMetadata {
    #[serde(alias = "metadataNamespace")]
    metadata_namespace: String,
    #[serde(default)]
    value: Option<Value>,
    /// Nothing that a test sees reads typed metadata, in Envoy's tool either.
    #[serde(alias = "typedValue", default, rename = "typed_value")]
    _typed_value: Option<Value>,
    #[serde(alias = "allowOverwrite", default)]
    allow_overwrite: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ValidationAssert {
    #[serde(alias = "clusterName")]
    cluster_name: Option<String>,
    #[serde(alias = "virtualClusterName")]
    virtual_cluster_name: Option<String>,
    #[serde(alias = "virtualHostName")]
    virtual_host_name: Option<String>,
    #[serde(alias = "hostRewrite")]
    host_rewrite: Option<String>,
    #[serde(alias = "pathRewrite")]
    path_rewrite: Option<String>,
    #[serde(alias = "pathRedirect")]
    path_redirect: Option<String>,
    #[serde(alias = "codeRedirect")]
    code_redirect: Option<u16>,
    timeout: Option<String>,
    #[serde(alias = "routeMetadata")]
    route_metadata: Vec<RouteMetadata>,
    #[serde(alias = "requestHeaderMatches")]
    request_header_matches: Vec<Value>,
    #[serde(alias = "responseHeaderMatches")]
    response_header_matches: Vec<Value>,
    /// Deprecated forms of `request_header_matches`.
    #[serde(
        alias = "requestHeaderFields",
        alias = "header_fields",
        alias = "headerFields"
    )]
    request_header_fields: Vec<HeaderValue>,
    #[serde(alias = "customHeaderFields")]
    custom_header_fields: Vec<HeaderValue>,
    /// Deprecated form of `response_header_matches`.
    #[serde(alias = "responseHeaderFields")]
    response_header_fields: Vec<HeaderValue>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RouteMetadata {
    namespace: String,
    key: String,
    value: String,
}

impl ValidationItem {
    fn convert(self) -> anyhow::Result<Test> {
        if self.test_name.is_empty() {
            bail!("test_name: must not be empty");
        }
        let assertions = self.validate.convert()?;
        if assertions.is_empty() {
            bail!("validate: needs at least one field");
        }
        Ok(Test {
            name: self.test_name,
            input: self.input.convert()?,
            assertions,
        })
    }
}

impl ValidationInput {
    fn convert(self) -> anyhow::Result<Request> {
        let method = self.method.unwrap_or_else(|| "GET".to_owned());
        if self.authority.is_empty() || self.path.is_empty() {
            bail!("input: authority and path must not be empty");
        }
        if method.len() < 3 {
            bail!("input.method: must have at least three letters");
        }
        let random: u64 = match self.random_value {
            Number::Absent => 0,
            Number::Whole(number) => number,
            Number::Text(text) => text.parse().context("input.random_value")?,
        };
        // Of a larger number Envoy's tool keeps the lower 32 bits, the highest of them as the sign.
        let random = i64::from(random as u32 as i32) as u64;
        let headers = |list: Vec<HeaderValue>| {
            list.into_iter()
                .map(|h| (h.key.to_ascii_lowercase(), h.value))
                .collect()
        };
        let mut metadata: BTreeMap<String, Value> = BTreeMap::new();
        for entry in self.dynamic_metadata {
            if entry.metadata_namespace.is_empty() {
                bail!("input.dynamic_metadata: metadata_namespace must not be empty");
            }
            let Some(value) = entry.value else { continue };
            match metadata.get_mut(&entry.metadata_namespace) {
                Some(known) if entry.allow_overwrite => merge(known, value),
                // As the filter does: what is there stays.
                Some(_) => {}
                None => {
                    metadata.insert(entry.metadata_namespace, value);
                }
            }
        }
        Ok(Request {
            authority: self.authority,
            path: self.path,
            method,
            random,
            ssl: self.ssl,
            internal: self.internal,
            runtime: self.runtime,
            headers: headers(self.additional_request_headers),
            response_headers: headers(self.additional_response_headers),
            metadata,
        })
    }
}

/// Members of both; those of the second win, but lists are joined.
fn merge(known: &mut Value, new: Value) {
    match (known, new) {
        (Value::Object(known), Value::Object(new)) => {
            for (key, value) in new {
                merge(known.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(known), Value::Array(new)) => known.extend(new),
        (known, new) => *known = new,
    }
}

impl ValidationAssert {
    fn convert(self) -> anyhow::Result<Vec<Assertion>> {
        let mut list = Vec::new();
        list.extend(self.cluster_name.map(Assertion::ClusterName));
        list.extend(self.virtual_cluster_name.map(Assertion::VirtualClusterName));
        list.extend(self.virtual_host_name.map(Assertion::VirtualHostName));
        list.extend(self.host_rewrite.map(Assertion::HostRewrite));
        list.extend(self.path_rewrite.map(Assertion::PathRewrite));
        list.extend(self.path_redirect.map(Assertion::PathRedirect));
        list.extend(self.code_redirect.map(Assertion::CodeRedirect));
        if let Some(text) = self.timeout {
            let seconds = text.strip_suffix('s').and_then(|s| s.parse::<f64>().ok());
            let timeout = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
            let timeout = timeout.with_context(|| {
                format!("validate.timeout: `{text}` is no duration such as 1.5s")
            })?;
            list.push(Assertion::Timeout(timeout));
        }
        list.extend(
            self.route_metadata
                .into_iter()
                .map(|m| Assertion::RouteMetadata {
                    namespace: m.namespace,
                    key: m.key,
                    value: m.value,
                }),
        );
        for value in self.request_header_matches {
            let (matcher, text) = header_matcher("request_header_matches", &value)?;
            list.push(Assertion::RequestHeader { matcher, text });
        }
        for value in self.response_header_matches {
            let (matcher, text) = header_matcher("response_header_matches", &value)?;
            list.push(Assertion::ResponseHeader { matcher, text });
        }
        let fields = self.request_header_fields.into_iter();
        let fields = fields.chain(self.custom_header_fields);
        list.extend(fields.map(|h| Assertion::RequestHeaderField {
            name: h.key.to_ascii_lowercase(),
            value: h.value,
        }));
        let fields = self.response_header_fields.into_iter();
        list.extend(fields.map(|h| Assertion::ResponseHeaderField {
            name: h.key.to_ascii_lowercase(),
            value: h.value,
        }));
        Ok(list)
    }
}

fn header_matcher(field: &str, value: &Value) -> anyhow::Result<(HeaderMatcher, String)> {
    let place = |e: String| anyhow!("validate.{field}: {e}");
    let message: proto::envoy::config::route::v3::HeaderMatcher =
        proto::json::from_envoy_value(value).map_err(|e| place(e.to_string()))?;
    let matcher = HeaderMatcher::try_from(&message).map_err(|e| place(e.to_string()))?;
    Ok((matcher, value.to_string()))
}
