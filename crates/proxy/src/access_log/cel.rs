//! Whether an expression holds for a request that is over. What has no value holds for nothing, and what cannot be
//! compared neither: an expression that fails lets no line through, as in Envoy.

use std::{borrow::Cow, cmp::Ordering, net::SocketAddr, time::Duration};

use outrigger_http::{Headers, Version};
use serde_json::Value as Json;

use crate::{
    http::Exchange,
    plan::{
        Address,
        cel::{Attribute, Compare, Expr, Literal, TextTest},
        route_match::RequestView,
    },
};

/// Whether it holds.
pub(super) fn holds(expression: &Expr, exchange: &Exchange<'_>) -> bool {
    matches!(value(expression, exchange), Some(Value::Bool(true)))
}

/// Writes what `%CEL(…)%` prints; what has no value is absent. `typed` (`%TYPED_CEL(…)%`): what is no text keeps its
/// type in JSON.
pub(super) fn write(
    expression: &Expr,
    typed: bool,
    exchange: &Exchange<'_>,
    out: &mut Vec<u8>,
) -> super::format::Presence {
    use super::format::Presence;
    let value = value(expression, exchange).map(Value::plain);
    let presence =
        match value {
            Some(
                Value::Int(_) | Value::Float(_) | Value::Bool(_) | Value::Json(_) | Value::Null,
            ) if typed => Presence::Json,
            _ => Presence::Text,
        };
    let text: Cow<'_, str> = match value {
        Some(Value::Null) if typed => "null".into(),
        Some(Value::Text(text)) => text,
        Some(Value::Int(number)) => number.to_string().into(),
        Some(Value::Float(number)) => number.to_string().into(),
        Some(Value::Bool(is)) => is.to_string().into(),
        Some(Value::Duration(time)) => format!("{}s", time.as_secs_f64()).into(),
        Some(Value::Json(json)) => json.to_string().into(),
        _ => return Presence::Absent,
    };
    out.extend_from_slice(text.as_bytes());
    presence
}

/// A value while it is looked at.
#[derive(Debug, Clone)]
enum Value<'v> {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Cow<'v, str>),
    Duration(Duration),
    List(Vec<Value<'v>>),
    /// Headers of a request, whose `:path` and the like count.
    Request(&'v Exchange<'v>),
    Headers(&'v Headers),
    Json(&'v Json),
    /// Namespaces of metadata.
    Metadata(&'v Exchange<'v>),
    FilterState(&'v Exchange<'v>),
}

/// A value; `None` where there is none, or where the expression makes no sense for it.
fn value<'v>(expression: &'v Expr, exchange: &'v Exchange<'_>) -> Option<Value<'v>> {
    let truth = |expression: &Expr| match value(expression, exchange) {
        Some(Value::Bool(is)) => Some(is),
        _ => None,
    };
    Some(match expression {
        Expr::Literal(literal) => match literal {
            Literal::Null => Value::Null,
            Literal::Bool(is) => Value::Bool(*is),
            Literal::Int(number) => Value::Int(*number),
            Literal::Float(number) => Value::Float(*number),
            Literal::Text(text) => Value::Text(Cow::Borrowed(text)),
            Literal::Duration(time) => Value::Duration(*time),
        },
        Expr::Attribute(attribute) => self::attribute(*attribute, exchange)?,
        Expr::Index(of, key) => value(of, exchange)?.member(&value(key, exchange)?)?,
        Expr::List(list) => Value::List(
            list.iter()
                .map(|expression| value(expression, exchange))
                .collect::<Option<_>>()?,
        ),
        Expr::Not(of) => Value::Bool(!truth(of)?),
        // One side alone may decide, whatever the other is (CEL's own rule).
        Expr::And(left, right) => match (truth(left), truth(right)) {
            (Some(false), _) | (_, Some(false)) => Value::Bool(false),
            (Some(true), Some(true)) => Value::Bool(true),
            _ => return None,
        },
        Expr::Or(left, right) => match (truth(left), truth(right)) {
            (Some(true), _) | (_, Some(true)) => Value::Bool(true),
            (Some(false), Some(false)) => Value::Bool(false),
            _ => return None,
        },
        Expr::If(parts) => match truth(&parts[0])? {
            true => value(&parts[1], exchange)?,
            false => value(&parts[2], exchange)?,
        },
        Expr::Compare(how, left, right) => {
            let (left, right) = (value(left, exchange)?, value(right, exchange)?);
            let order = left.compare(&right);
            Value::Bool(match how {
                Compare::Eq => order == Some(Ordering::Equal),
                Compare::Ne => order != Some(Ordering::Equal),
                Compare::Lt => order? == Ordering::Less,
                Compare::Le => order? != Ordering::Greater,
                Compare::Gt => order? == Ordering::Greater,
                Compare::Ge => order? != Ordering::Less,
            })
        }
        Expr::In(what, of) => {
            let (what, of) = (value(what, exchange)?, value(of, exchange)?);
            Value::Bool(match &of {
                Value::List(list) => list
                    .iter()
                    .any(|element| element.compare(&what) == Some(Ordering::Equal)),
                Value::Json(Json::Array(list)) => list
                    .iter()
                    .any(|element| Value::Json(element).compare(&what) == Some(Ordering::Equal)),
                map => map.member(&what).is_some(),
            })
        }
        Expr::Text(test, text, part) => {
            let (text, part) = (
                value(text, exchange)?.text()?,
                value(part, exchange)?.text()?,
            );
            Value::Bool(match test {
                TextTest::Contains => text.contains(&*part),
                TextTest::StartsWith => text.starts_with(&*part),
                TextTest::EndsWith => text.ends_with(&*part),
            })
        }
        Expr::Matches(text, regex) => {
            // Somewhere in the text, as in CEL.
            let text = value(text, exchange)?.text()?;
            Value::Bool(regex.search().is_match(text.as_bytes()))
        }
        Expr::Has(of) => Value::Bool(value(of, exchange).is_some()),
        Expr::Size(of) => Value::Int(match value(of, exchange)? {
            Value::List(list) => list.len() as i64,
            Value::Headers(headers) => headers.len() as i64,
            Value::Request(exchange) => exchange.request.headers.len() as i64,
            Value::Json(Json::Array(list)) => list.len() as i64,
            Value::Json(Json::Object(members)) => members.len() as i64,
            other => other.text()?.chars().count() as i64,
        }),
        Expr::Int(of) => Value::Int(match value(of, exchange)?.plain() {
            Value::Int(number) => number,
            Value::Float(number) => number as i64,
            Value::Text(text) => text.parse().ok()?,
            _ => return None,
        }),
        Expr::Str(of) => Value::Text(match value(of, exchange)?.plain() {
            Value::Text(text) => text,
            Value::Int(number) => number.to_string().into(),
            Value::Float(number) => number.to_string().into(),
            Value::Bool(is) => is.to_string().into(),
            _ => return None,
        }),
    })
}

impl<'v> Value<'v> {
    /// A member of a map, or an element of a list.
    fn member(&self, key: &Value<'_>) -> Option<Value<'v>> {
        let json = |json: Option<&'v Json>| Some(Value::Json(json?));
        match (self, key) {
            (Value::List(list), Value::Int(index)) => {
                list.get(usize::try_from(*index).ok()?).cloned()
            }
            (Value::Json(Json::Array(list)), Value::Int(index)) => {
                json(list.get(usize::try_from(*index).ok()?))
            }
            (map, key) => {
                let key = key.clone().text()?;
                match map {
                    Value::Request(exchange) => field(exchange.header(&key)?),
                    Value::Headers(headers) => Some(Value::Text(text_of(headers.joined(&key)?))),
                    Value::Metadata(exchange) => json(exchange.dynamic_metadata.get(&*key)),
                    Value::FilterState(exchange) => json(exchange.state(&key)),
                    Value::Json(Json::Object(members)) => json(members.get(&*key)),
                    _ => None,
                }
            }
        }
    }

    /// What of JSON is no structure, as itself.
    fn plain(self) -> Value<'v> {
        match self {
            Value::Json(Json::Null) => Value::Null,
            Value::Json(Json::Bool(is)) => Value::Bool(*is),
            Value::Json(Json::String(text)) => Value::Text(Cow::Borrowed(text)),
            Value::Json(Json::Number(number)) => match number.as_i64() {
                Some(whole) => Value::Int(whole),
                None => Value::Float(number.as_f64().unwrap_or_default()),
            },
            other => other,
        }
    }

    fn text(self) -> Option<Cow<'v, str>> {
        match self.plain() {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// How two values of a kind stand to each other.
    fn compare(&self, other: &Value<'_>) -> Option<Ordering> {
        let (left, right) = (self.clone().plain(), other.clone().plain());
        match (&left, &right) {
            (Value::Null, Value::Null) => Some(Ordering::Equal),
            (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
            (Value::Int(a), Value::Int(b)) => Some(a.cmp(b)),
            (Value::Float(a), Value::Float(b)) => a.partial_cmp(b),
            (Value::Int(a), Value::Float(b)) => (*a as f64).partial_cmp(b),
            (Value::Float(a), Value::Int(b)) => a.partial_cmp(&(*b as f64)),
            (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
            (Value::Duration(a), Value::Duration(b)) => Some(a.cmp(b)),
            (Value::List(a), Value::List(b)) if a.len() == b.len() => {
                let same = |(a, b): (&Value<'_>, &Value<'_>)| a.compare(b) == Some(Ordering::Equal);
                a.iter().zip(b).all(same).then_some(Ordering::Equal)
            }
            _ => None,
        }
    }
}

fn attribute<'v>(attribute: Attribute, exchange: &'v Exchange<'_>) -> Option<Value<'v>> {
    use Attribute as A;
    let (request, response) = (&exchange.request, exchange.response.as_ref());
    let (connection, upstream) = (exchange.connection, &exchange.upstream);
    let progress = &exchange.progress;
    let header = |name| Some(Value::Text(text_of(request.headers.joined(name)?)));
    let text = |text: &'v str| Some(Value::Text(Cow::Borrowed(text)));
    let number = |number: u64| Some(Value::Int(number.min(i64::MAX as u64) as i64));
    let address = |address: Option<SocketAddr>| Some(Value::Text(address?.to_string().into()));
    let peer = || connection.tls.as_ref()?.peer.as_deref();
    let host = || match &upstream.host.as_ref()?.address {
        Address::Socket(socket) => Some(*socket),
        _ => None,
    };
    match attribute {
        A::RequestPath => text(request.path()),
        A::RequestUrlPath => text(request.path().split('?').next().unwrap_or_default()),
        A::RequestQuery => text(
            request
                .path()
                .split_once('?')
                .map_or("", |(_, query)| query),
        ),
        A::RequestHost => text(request.authority()),
        A::RequestScheme => text(request.scheme()),
        A::RequestMethod => text(request.method.as_str()),
        A::RequestHeaders => Some(Value::Request(exchange)),
        A::RequestReferer => header("referer"),
        A::RequestUserAgent => header("user-agent"),
        A::RequestId => header("x-request-id"),
        A::RequestProtocol => text(match request.version {
            Version::Http10 => "HTTP/1.0",
            Version::Http11 => "HTTP/1.1",
            Version::Http2 => "HTTP/2",
        }),
        A::RequestSize => number(progress.received),
        A::RequestTotalSize => number(progress.received + request.headers.wire_size() as u64),
        A::RequestDuration => Some(Value::Duration(exchange.duration())),
        A::ResponseCode => number(exchange.status().into()),
        A::ResponseCodeDetails => text(&exchange.details),
        A::ResponseFlags => number(exchange.flags.bits().into()),
        A::ResponseGrpcStatus => number(super::grpc_status::of(exchange)?.into()),
        A::ResponseHeaders => Some(Value::Headers(&response?.headers)),
        A::ResponseTrailers => Some(Value::Headers(exchange.trailers.as_ref()?)),
        A::ResponseSize => number(progress.sent),
        A::ResponseBackendLatency => {
            let (sent, received) = (
                progress.upstream_first_sent?,
                progress.upstream_first_received?,
            );
            Some(Value::Duration(received.saturating_duration_since(sent)))
        }
        A::SourceAddress => address(connection.remote),
        A::SourcePort => number(connection.remote?.port().into()),
        A::DestinationAddress => address(connection.local),
        A::DestinationPort => number(connection.local?.port().into()),
        A::ConnectionId => number(connection.id),
        A::ConnectionMtls => Some(Value::Bool(peer().is_some())),
        A::ConnectionServerName => text(connection.requested_server_name.as_deref()?),
        A::ConnectionTlsVersion => text(connection.tls.as_ref()?.version),
        A::ConnectionPeerSubject => text(&peer()?.subject),
        A::ConnectionPeerUri => text(peer()?.uris.first()?),
        A::ConnectionPeerDns => text(peer()?.dns.first()?),
        A::ConnectionTermination => text(connection.termination_details.as_deref()?),
        A::UpstreamAddress => address(host()),
        A::UpstreamPort => number(host()?.port().into()),
        A::UpstreamLocalAddress => address(upstream.local),
        A::UpstreamTlsVersion => text(upstream.tls.as_ref()?.version),
        A::UpstreamFailure => text(&upstream.failure),
        A::UpstreamAttempts => number(upstream.attempts.into()),
        A::ClusterName => text(upstream.cluster_name()?),
        A::RouteName => text(&exchange.route.route()?.name),
        A::FilterChainName => text(&connection.chain.as_ref()?.name),
        A::Metadata => Some(Value::Metadata(exchange)),
        A::FilterState => Some(Value::FilterState(exchange)),
    }
}

fn field(bytes: Cow<'_, [u8]>) -> Option<Value<'_>> {
    Some(Value::Text(text_of(bytes)))
}

/// Bytes that are no text are shown as far as they are.
fn text_of(bytes: Cow<'_, [u8]>) -> Cow<'_, str> {
    match bytes {
        Cow::Borrowed(bytes) => String::from_utf8_lossy(bytes),
        Cow::Owned(bytes) => String::from_utf8_lossy(&bytes).into_owned().into(),
    }
}
