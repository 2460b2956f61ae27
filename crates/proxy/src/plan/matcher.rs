//! Conditions on texts, headers, query parameters and metadata, and shares of requests.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
};

use ipnet::IpNet;
use outrigger_http::Headers;
use serde_json::Value;

use super::{header::Joined, regex::Regex, route_match::RequestView};

/// `envoy.type.matcher.v3.StringMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StringMatcher {
    /// The condition.
    pub pattern: StringPattern,
    /// ASCII letters match in both cases (not for regex).
    pub ignore_case: bool,
}

/// Condition on a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringPattern {
    /// Equals.
    Exact(Box<str>),
    /// Begins with.
    Prefix(Box<str>),
    /// Ends with.
    Suffix(Box<str>),
    /// Holds.
    Contains(Box<str>),
    /// Matches as a whole.
    Regex(Regex),
}

impl StringMatcher {
    /// Whether the text meets the condition.
    pub fn matches(&self, text: &[u8]) -> bool {
        let same = |a: &[u8], b: &str| {
            if self.ignore_case {
                a.eq_ignore_ascii_case(b.as_bytes())
            } else {
                a == b.as_bytes()
            }
        };
        match &self.pattern {
            StringPattern::Exact(want) => same(text, want),
            StringPattern::Prefix(want) => text.get(..want.len()).is_some_and(|t| same(t, want)),
            StringPattern::Suffix(want) => text
                .len()
                .checked_sub(want.len())
                .is_some_and(|start| same(&text[start..], want)),
            StringPattern::Contains(want) if self.ignore_case => {
                want.is_empty() || text.windows(want.len()).any(|w| same(w, want))
            }
            StringPattern::Contains(want) => memchr::memmem::find(text, want.as_bytes()).is_some(),
            StringPattern::Regex(regex) => regex.is_match(text),
        }
    }
}

/// `envoy.config.route.v3.HeaderMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderMatcher {
    /// Lower case; pseudo headers with their colon.
    pub name: Arc<str>,
    /// The condition on its value; of several fields one has to meet it, where they are not [`HeaderMatcher::joined`].
    pub condition: HeaderCondition,
    /// Where several fields are one value.
    pub joined: Joined,
    /// Turns the answer round.
    pub invert: bool,
    /// A missing header counts as an empty one; else it meets no condition, inverted ones included.
    pub missing_as_empty: bool,
}

/// Condition on a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderCondition {
    /// On its text.
    Text(StringMatcher),
    /// On its number.
    Range(Range<i64>),
    /// It is there, or not.
    Present(bool),
}

impl HeaderMatcher {
    /// Whether the request meets the condition. Each field of most names is looked at by itself, and one that meets it is
    /// enough: joined, a second field would hide the first from a policy that refuses it.
    pub fn matches(&self, request: &(impl RequestView + ?Sized)) -> bool {
        if self.joined.request {
            return self.matches_value(request.header(&self.name).as_deref());
        }
        self.answer(request.any_field(&self.name, &mut |value| self.holds(value)))
    }

    /// The same for the fields of a response.
    pub fn matches_response(&self, headers: &Headers) -> bool {
        self.matches_fields(headers, self.joined.response)
    }

    /// The same for the fields of a request.
    pub fn matches_request(&self, headers: &Headers) -> bool {
        self.matches_fields(headers, self.joined.request)
    }

    fn matches_fields(&self, headers: &Headers, joined: bool) -> bool {
        if joined {
            return self.matches_value(headers.joined(&self.name).as_deref());
        }
        let fields = headers.get_all(&self.name);
        self.answer(fields.map(|value| self.holds(value)).reduce(|a, b| a || b))
    }

    /// Whether a single value, or none, meets the condition.
    pub fn matches_value(&self, value: Option<&[u8]>) -> bool {
        self.answer(value.map(|value| self.holds(value)))
    }

    /// From whether one of the fields holds; `None` where there is no field.
    fn answer(&self, any: Option<bool>) -> bool {
        match (any, &self.condition) {
            (Some(any), _) => any != self.invert,
            (None, _) if self.missing_as_empty => self.holds(b"") != self.invert,
            (None, HeaderCondition::Present(present)) => *present == self.invert,
            (None, _) => false,
        }
    }

    fn holds(&self, value: &[u8]) -> bool {
        match &self.condition {
            HeaderCondition::Text(matcher) => matcher.matches(value),
            HeaderCondition::Range(range) => std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse::<i64>().ok())
                .is_some_and(|number| range.contains(&number)),
            HeaderCondition::Present(present) => *present,
        }
    }
}

/// `envoy.config.route.v3.QueryParameterMatcher`, on the first parameter of that name, not percent-decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryMatcher {
    /// Case-sensitive.
    pub name: Box<str>,
    /// The condition.
    pub condition: QueryCondition,
}

/// Condition on a query parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueryCondition {
    /// On its text.
    Text(StringMatcher),
    /// It is there, or not.
    Present(bool),
}

impl QueryMatcher {
    /// Whether a path with its query meets the condition.
    pub fn matches(&self, path_and_query: &[u8]) -> bool {
        let value = query_parameter(path_and_query, self.name.as_bytes());
        match &self.condition {
            QueryCondition::Text(matcher) => value.is_some_and(|v| matcher.matches(v)),
            QueryCondition::Present(present) => value.is_some() == *present,
        }
    }
}

/// `envoy.config.route.v3.CookieMatcher`, on the first cookie of that name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CookieMatcher {
    /// Case-sensitive.
    pub name: Box<str>,
    /// Condition on its value; a missing cookie does not meet it.
    pub value: StringMatcher,
    /// The opposite; then a missing cookie matches.
    pub invert: bool,
}

impl CookieMatcher {
    /// Whether the cookies of a request meet the condition.
    pub fn matches(&self, request: &(impl RequestView + ?Sized)) -> bool {
        let mut found = None;
        request.any_field("cookie", &mut |field| {
            found = cookie(field, self.name.as_bytes()).map(|value| self.value.matches(value));
            found.is_some()
        });
        found.unwrap_or(false) != self.invert
    }
}

/// A cookie's value, without its quotes.
pub fn cookie<'a>(cookies: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    cookies.split(|&byte| byte == b';').find_map(|pair| {
        let pair = pair.trim_ascii();
        let at = memchr::memchr(b'=', pair)?;
        let value = pair[..at].eq(name).then_some(&pair[at + 1..])?;
        Some(
            value
                .strip_prefix(b"\"")
                .and_then(|v| v.strip_suffix(b"\""))
                .unwrap_or(value),
        )
    })
}

/// The first value of a query parameter; empty when it has no `=`. A fragment would be part of it: no request comes this
/// far with one.
pub fn query_parameter<'a>(path_and_query: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let start = memchr::memchr(b'?', path_and_query)? + 1;
    path_and_query[start..]
        .split(|b| *b == b'&')
        .find_map(|pair| {
            let (key, value) = match memchr::memchr(b'=', pair) {
                Some(at) => (&pair[..at], &pair[at + 1..]),
                None => (pair, &b""[..]),
            };
            (key == name).then_some(value)
        })
}

/// `envoy.type.matcher.v3.MetadataMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataMatcher {
    /// Namespace.
    pub filter: Arc<str>,
    /// Keys from its root.
    pub path: Vec<Arc<str>>,
    /// Condition on the value there.
    pub value: ValueMatcher,
    /// Turns the answer round.
    pub invert: bool,
}

impl MetadataMatcher {
    /// Whether the value (or none) at filter and path meets the condition. None meets no condition, not even that there is
    /// none: `invert` says that.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        value.is_some_and(|v| self.value.matches(v)) != self.invert
    }
}

/// `envoy.type.matcher.v3.FilterStateMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterStateMatcher {
    /// Name of the object.
    pub key: Arc<str>,
    /// Condition on it.
    pub condition: FilterStateCondition,
}

/// Condition on a filter state object; a missing one meets none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilterStateCondition {
    /// On its text form.
    Text(StringMatcher),
    /// It is an address that meets the condition; what is no address meets none.
    Address(AddressMatcher),
}

impl FilterStateMatcher {
    /// Whether the object (or none) meets the condition.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        let Some(value) = value else { return false };
        let text: Cow<'_, str> = match value.as_str() {
            Some(text) => text.into(),
            None => value.to_string().into(),
        };
        match &self.condition {
            FilterStateCondition::Text(matcher) => matcher.matches(text.as_bytes()),
            FilterStateCondition::Address(ranges) => {
                let ip = text.parse::<IpAddr>();
                let ip = ip.or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
                ip.is_ok_and(|ip| ranges.matches(ip))
            }
        }
    }
}

/// `envoy.type.matcher.v3.AddressMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressMatcher {
    /// One of them has the address.
    pub ranges: Vec<IpNet>,
    /// None of them has it, instead.
    pub invert: bool,
}

impl AddressMatcher {
    /// Whether an address meets the condition.
    pub fn matches(&self, ip: IpAddr) -> bool {
        self.ranges.iter().any(|net| net.contains(&ip)) != self.invert
    }
}

/// `envoy.type.matcher.v3.ValueMatcher`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ValueMatcher {
    /// Null.
    Null,
    /// This number.
    Number(Finite),
    /// A number from the first on, below the second.
    Range(Finite, Finite),
    /// A text.
    Text(StringMatcher),
    /// A truth value.
    Bool(bool),
    /// Any value, a null too (true); false matches nothing, in Envoy too.
    Present(bool),
    /// A list with an element that fits.
    OneOf(Box<ValueMatcher>),
    /// One of these.
    Or(Vec<ValueMatcher>),
}

impl ValueMatcher {
    /// Whether the value meets the condition.
    pub fn matches(&self, value: &Value) -> bool {
        match self {
            Self::Null => value.is_null(),
            Self::Number(want) => value.as_f64() == Some(want.0),
            Self::Range(from, to) => value
                .as_f64()
                .is_some_and(|number| from.0 <= number && number < to.0),
            Self::Text(matcher) => value
                .as_str()
                .is_some_and(|t| matcher.matches(t.as_bytes())),
            Self::Bool(want) => value.as_bool() == Some(*want),
            Self::Present(present) => *present,
            Self::OneOf(element) => value
                .as_array()
                .is_some_and(|list| list.iter().any(|v| element.matches(v))),
            Self::Or(any) => any.iter().any(|m| m.matches(value)),
        }
    }
}

/// A finite floating-point number, so that plans can be compared.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Finite(f64);

/// `NaN` cannot be made.
impl Eq for Finite {}

impl Finite {
    /// `None` for NaN and infinities.
    pub fn new(number: f64) -> Option<Self> {
        number.is_finite().then_some(Self(number))
    }

    /// The number.
    pub fn get(self) -> f64 {
        self.0
    }
}

/// `FractionalPercent`: a share of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fraction {
    /// Up to the denominator; more counts as all.
    pub numerator: u32,
    /// 100, 10 000 or 1 000 000.
    pub denominator: u32,
}

impl Fraction {
    /// Every request.
    pub const ALL: Self = Self {
        numerator: 100,
        denominator: 100,
    };
    /// No request.
    pub const NONE: Self = Self {
        numerator: 0,
        denominator: 100,
    };

    /// Whether a request with this random number is in the share.
    pub fn hits(self, random: u64) -> bool {
        random % u64::from(self.denominator) < u64::from(self.numerator)
    }
}

/// `RuntimeFractionalPercent`: a share of requests under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeFraction {
    /// Only the route check asks for it: runtime has static layers here, and the default counts.
    pub key: Arc<str>,
    /// The share.
    pub default: Fraction,
}

/// `Percent` in parts per million.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Percent(u32);

impl Percent {
    /// From 0.0 to 100.0; `None` outside.
    pub fn new(percent: f64) -> Option<Self> {
        (0.0..=100.0)
            .contains(&percent)
            .then(|| Self((percent * 10_000.0).round() as u32))
    }

    /// From whole percent, at most 100.
    pub const fn whole(percent: u32) -> Self {
        assert!(percent <= 100);
        Self(percent * 10_000)
    }

    /// From 0 to 1.
    pub fn ratio(self) -> f64 {
        f64::from(self.0) / 1e6
    }

    /// Parts per million.
    pub const fn ppm(self) -> u32 {
        self.0
    }

    /// Whether a request with this random number is in the share.
    pub fn hits(self, random: u64) -> bool {
        random % 1_000_000 < u64::from(self.0)
    }
}
