//! The small messages: durations, shares, addresses, metadata, extensions, sources, matchers.

use std::{net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;
use prost::{Message, Name};
use proto::{
    Any, Struct,
    envoy::{
        config::{core::v3 as core, route::v3 as route},
        r#type::{matcher::v3 as matcher, v3 as types},
    },
    json::JsonError,
    prost_types,
};
use serde_json::Value;

use crate::plan::{
    address::Address,
    bootstrap::{ConfigSource, ConfigSourceKind},
    error::{At, Reported, Step, unsupported},
    header::Joined,
    matcher::{
        AddressMatcher, CookieMatcher, FilterStateCondition, FilterStateMatcher, Finite, Fraction,
        HeaderCondition, HeaderMatcher, MetadataMatcher, Percent, QueryCondition, QueryMatcher,
        StringMatcher, StringPattern, ValueMatcher,
    },
    metadata::Metadata,
    regex::Regex,
    route::{RegexRewrite, Substitution, SubstitutionPart},
    tls::DataSource,
};

/// A duration that is not negative.
pub(super) fn duration(at: At<'_>, m: &prost_types::Duration) -> Step<Duration> {
    match (u64::try_from(m.seconds), u32::try_from(m.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
        _ => Err(at.error("must be a duration that is not negative, such as 1.5s")),
    }
}

/// A duration where 0 and absence have the same meaning: none.
pub(super) fn positive(
    at: &At<'_>,
    name: &str,
    m: &Option<prost_types::Duration>,
) -> Step<Option<Duration>> {
    Ok(at.optional(name, m, duration)?.filter(|d| !d.is_zero()))
}

/// A duration where absence means a default and 0 means disabled.
pub(super) fn or_disabled(
    at: &At<'_>,
    name: &str,
    m: &Option<prost_types::Duration>,
    default: Option<Duration>,
) -> Step<Option<Duration>> {
    Ok(match at.optional(name, m, duration)? {
        None => default,
        Some(given) => Some(given).filter(|d| !d.is_zero()),
    })
}

/// A duration that must be greater than 0 where it is given.
pub(super) fn above_zero(
    at: &At<'_>,
    name: &str,
    m: &Option<prost_types::Duration>,
) -> Step<Option<Duration>> {
    at.optional(name, m, |at, m| match duration(at, m)? {
        Duration::ZERO => Err(at.error("must be longer than 0s")),
        given => Ok(given),
    })
}

/// A value of an enum of the message, by its number.
pub(super) fn enumeration<E: TryFrom<i32>>(at: &At<'_>, name: &str, number: i32) -> Step<E> {
    E::try_from(number).map_err(|_| {
        at.field(name)
            .error(format!("{number} is not one of this field's values"))
    })
}

/// `Percent`.
pub(super) fn percent(at: At<'_>, m: &types::Percent) -> Step<Percent> {
    Percent::new(m.value).ok_or_else(|| at.field("value").error("must be from 0 to 100"))
}

/// `FractionalPercent`.
pub(super) fn fraction(at: At<'_>, m: &types::FractionalPercent) -> Step<Fraction> {
    use types::fractional_percent::DenominatorType as D;
    let denominator = match enumeration::<D>(&at, "denominator", m.denominator)? {
        D::Hundred => 100,
        D::TenThousand => 10_000,
        D::Million => 1_000_000,
    };
    Ok(Fraction {
        numerator: m.numerator,
        denominator,
    })
}

/// `RuntimeFractionalPercent`; the key is accepted without effect.
pub(super) fn runtime_fraction(at: At<'_>, m: &core::RuntimeFractionalPercent) -> Step<Fraction> {
    let core::RuntimeFractionalPercent {
        default_value,
        runtime_key: _,
    } = m;
    Ok(at
        .optional("default_value", default_value, fraction)?
        .unwrap_or(Fraction::NONE))
}

/// `Address`; host names are legal where `names` says so.
pub(super) fn address(at: At<'_>, m: &core::Address, names: bool) -> Step<Address> {
    use core::address::Address as A;
    match &m.address {
        Some(A::SocketAddress(m)) => socket_address(at.field("socket_address"), m, names),
        Some(A::Pipe(m)) => {
            let at = at.field("pipe");
            let path = at.text("path", &m.path)?;
            Ok(Address::Pipe {
                path: path.as_ref().into(),
                mode: m.mode,
            })
        }
        Some(A::EnvoyInternalAddress(_)) => Err(at
            .field("envoy_internal_address")
            .not_implemented("is not implemented; remove it")),
        None => Err(at.error("needs one of socket_address, pipe")),
    }
}

/// `SocketAddress`.
pub(super) fn socket_address(at: At<'_>, m: &core::SocketAddress, names: bool) -> Step<Address> {
    use core::socket_address::PortSpecifier;
    let core::SocketAddress {
        protocol,
        address,
        port_specifier,
        resolver_name,
        ipv4_compat: _,
        network_namespace_filepath,
    } = m;
    unsupported!(at, resolver_name, network_namespace_filepath);
    if *protocol != 0 {
        at.field("protocol")
            .not_implemented("UDP is not implemented; write TCP");
    }
    let port = match port_specifier {
        None => 0,
        Some(PortSpecifier::PortValue(port)) => u16::try_from(*port)
            .map_err(|_| at.field("port_value").error("must be from 0 to 65535"))?,
        Some(PortSpecifier::NamedPort(_)) => {
            return Err(at
                .field("named_port")
                .not_implemented("is not implemented; write port_value"));
        }
    };
    let text = at.text("address", address)?;
    match text.parse::<IpAddr>() {
        Ok(ip) => Ok(Address::Socket((ip, port).into())),
        Err(_) if names => Ok(Address::Name { host: text, port }),
        Err(_) => Err(at
            .field("address")
            .error(format!("`{text}` is not an IP address"))),
    }
}

/// `CidrRange`.
pub(super) fn cidr(at: At<'_>, m: &core::CidrRange) -> Step<IpNet> {
    let ip: IpAddr = m.address_prefix.parse().map_err(|_| {
        at.field("address_prefix")
            .error(format!("`{}` is not an IP address", m.address_prefix))
    })?;
    let length = m.prefix_len.unwrap_or(0);
    u8::try_from(length)
        .ok()
        .and_then(|length| IpNet::new(ip, length).ok())
        .map(|net| net.trunc())
        .ok_or_else(|| {
            at.field("prefix_len")
                .error(format!("{length} is too long for {ip}"))
        })
}

/// A `Struct` as JSON; whole numbers stay whole.
pub(crate) fn json(m: &Struct) -> Value {
    Value::Object(
        m.fields
            .iter()
            .map(|(k, v)| (k.clone(), json_value(v)))
            .collect(),
    )
}

fn json_value(m: &prost_types::Value) -> Value {
    use prost_types::value::Kind;
    match &m.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(b)) => (*b).into(),
        Some(Kind::StringValue(s)) => s.clone().into(),
        // Beyond 2^53 a double does not hold every whole number.
        Some(Kind::NumberValue(n)) if n.fract() == 0.0 && n.abs() < 9e15 => (*n as i64).into(),
        Some(Kind::NumberValue(n)) => (*n).into(),
        Some(Kind::StructValue(s)) => json(s),
        Some(Kind::ListValue(l)) => l.values.iter().map(json_value).collect(),
    }
}

/// `Metadata`; typed metadata is accepted without effect.
pub(super) fn metadata(m: &Option<core::Metadata>) -> Metadata {
    let by_namespace = m.iter().flat_map(|m| &m.filter_metadata);
    Metadata::new(by_namespace.map(|(k, v)| (k.clone(), json(v))).collect())
}

/// An extension's message with its full type name; a `TypedStruct` stands for the message it names.
pub(super) struct Extension<'a> {
    /// Full name, e.g. `envoy.extensions.filters.http.router.v3.Router`.
    pub(super) name: String,
    content: Content<'a>,
}

enum Content<'a> {
    Encoded(&'a [u8]),
    /// Turned into the message only by whoever knows the type, so that an unknown one is rejected by its name.
    Json(Value),
}

impl Extension<'_> {
    /// The message.
    pub(super) fn decode<M: Message + Default + Name>(&self, at: &At<'_>) -> Step<M> {
        let converted;
        let encoded = match &self.content {
            Content::Encoded(encoded) => *encoded,
            Content::Json(value) => {
                let at = at.field("value");
                converted =
                    proto::json::struct_to_encoded(&self.name, value).map_err(|e| match e {
                        JsonError::Field { path, message } if !path.is_empty() => {
                            at.field(&path).error(message)
                        }
                        other => at.error(other.to_string()),
                    })?;
                &converted
            }
        };
        M::decode(encoded).map_err(|e| at.error(format!("is not a {}: {e}", self.name)))
    }

    /// Reports that nothing here implements it.
    pub(super) fn unknown(&self, at: &At<'_>, what: &str) -> Reported {
        at.not_implemented(format!(
            "{what} {} is not implemented; remove it",
            self.name
        ))
    }
}

/// Opens an `Any`.
pub(super) fn extension<'a>(at: &At<'_>, any: &'a Any) -> Step<Extension<'a>> {
    let name = proto::any::type_name(&any.type_url);
    let wrong = |e| at.error(format!("is not a {name}: {e}"));
    let (inner, value) = match name {
        "udpa.type.v1.TypedStruct" => {
            let m = proto::udpa::r#type::v1::TypedStruct::decode(&*any.value).map_err(wrong)?;
            (m.type_url, m.value)
        }
        "xds.type.v3.TypedStruct" => {
            let m = proto::xds::r#type::v3::TypedStruct::decode(&*any.value).map_err(wrong)?;
            (m.type_url, m.value)
        }
        "" => {
            return Err(at
                .field("@type")
                .error("is required: the type URL of this extension"));
        }
        _ => {
            return Ok(Extension {
                name: name.to_owned(),
                content: Content::Encoded(&any.value),
            });
        }
    };
    let name = proto::any::type_name(&inner).to_owned();
    Ok(Extension {
        name,
        content: Content::Json(json(&value.unwrap_or_default())),
    })
}

/// `TypedExtensionConfig`, which must be there with its `typed_config`.
pub(super) fn typed_config<'a>(
    at: &At<'_>,
    any: &'a Option<Any>,
    what: &str,
) -> Step<Extension<'a>> {
    match any {
        Some(any) => extension(&at.field("typed_config"), any),
        None => Err(at.field("typed_config").error(format!(
            "is required: the configuration of this {what} with its @type"
        ))),
    }
}

/// `ConfigSource`.
pub(super) fn config_source(at: At<'_>, m: &core::ConfigSource) -> Step<ConfigSource> {
    use core::config_source::ConfigSourceSpecifier as S;
    let core::ConfigSource {
        authorities,
        initial_fetch_timeout,
        resource_api_version,
        config_source_specifier,
    } = m;
    unsupported!(at, authorities);
    // AUTO and V2 are what messages of old say.
    if !matches!(resource_api_version, 0 | 2) {
        at.field("resource_api_version").error("must be V3");
    }
    let timeout = or_disabled(
        &at,
        "initial_fetch_timeout",
        initial_fetch_timeout,
        Some(Duration::from_secs(15)),
    )?;
    let kind = match config_source_specifier {
        Some(S::Ads(_) | S::Self_(_)) => ConfigSourceKind::Ads,
        Some(S::Path(path)) => ConfigSourceKind::Path(path.into()),
        Some(S::PathConfigSource(m)) => ConfigSourceKind::Path(m.path.clone().into()),
        Some(S::ApiConfigSource(m)) => {
            let (cluster, delta) = api_config_source(at.field("api_config_source"), m)?;
            ConfigSourceKind::Grpc { cluster, delta }
        }
        None => return Err(at.error("needs one of ads, api_config_source, path_config_source")),
    };
    Ok(ConfigSource {
        kind,
        initial_fetch_timeout: timeout,
    })
}

/// A `ConfigSource` of something that only the aggregated stream brings.
pub(super) fn ads_source(at: At<'_>, m: &core::ConfigSource) -> Step<ConfigSource> {
    let source = config_source(at, m)?;
    if source.kind != ConfigSourceKind::Ads {
        return Err(at.error("only the aggregated stream is implemented; write `ads: {}`"));
    }
    Ok(source)
}

/// `ApiConfigSource`: the cluster, and whether delta is spoken.
pub(super) fn api_config_source(at: At<'_>, m: &core::ApiConfigSource) -> Step<(Arc<str>, bool)> {
    use core::api_config_source::ApiType;
    use core::grpc_service::TargetSpecifier;
    let delta = match enumeration::<ApiType>(&at, "api_type", m.api_type)? {
        ApiType::Grpc | ApiType::AggregatedGrpc => false,
        ApiType::DeltaGrpc | ApiType::AggregatedDeltaGrpc => true,
        ApiType::Rest | ApiType::DeprecatedAndUnavailableDoNotUse => {
            return Err(at.field("api_type").error("must be GRPC or DELTA_GRPC"));
        }
    };
    let services = at.field("grpc_services");
    let [service] = &*m.grpc_services else {
        return Err(services.error("needs exactly one service"));
    };
    let at = services.index(0);
    match &service.target_specifier {
        Some(TargetSpecifier::EnvoyGrpc(m)) => Ok((
            at.field("envoy_grpc")
                .text("cluster_name", &m.cluster_name)?,
            delta,
        )),
        Some(TargetSpecifier::GoogleGrpc(_)) => Err(at
            .field("google_grpc")
            .not_implemented("is not implemented; write envoy_grpc")),
        None => Err(at.error("needs envoy_grpc")),
    }
}

/// `DataSource`.
pub(super) fn data_source(at: At<'_>, m: &core::DataSource) -> Step<DataSource> {
    use core::data_source::Specifier as S;
    match &m.specifier {
        Some(S::Filename(path)) => Ok(DataSource::File(path.into())),
        Some(S::InlineBytes(bytes)) => Ok(DataSource::Inline(bytes.clone().into())),
        Some(S::InlineString(text)) => Ok(DataSource::Inline(text.clone().into())),
        Some(S::EnvironmentVariable(name)) => Ok(DataSource::Environment(name.as_str().into())),
        None => {
            Err(at
                .error("needs one of filename, inline_bytes, inline_string, environment_variable"))
        }
    }
}

/// `RegexMatcher`.
pub(super) fn regex(at: At<'_>, m: &matcher::RegexMatcher) -> Step<Regex> {
    let matcher::RegexMatcher {
        regex,
        engine_type: _,
    } = m;
    if regex.is_empty() {
        return Err(at.field("regex").error("is required and must not be empty"));
    }
    Regex::new(regex).map_err(|why| at.field("regex").error(format!("`{regex}` {why}")))
}

/// `RegexMatchAndSubstitute`.
pub(super) fn regex_rewrite(
    at: At<'_>,
    m: &matcher::RegexMatchAndSubstitute,
) -> Step<RegexRewrite> {
    let regex = at.required("pattern", &m.pattern, regex)?;
    let substitution =
        substitution(&m.substitution).map_err(|why| at.field("substitution").error(why))?;
    let groups = regex.search().captures_len();
    for part in &substitution.0 {
        if let SubstitutionPart::Group(n) = part
            && *n >= groups
        {
            at.field("substitution")
                .error(format!("\\{n} refers to a group that the pattern has not"));
        }
    }
    Ok(RegexRewrite {
        regex,
        substitution,
    })
}

fn substitution(text: &str) -> Result<Substitution, String> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            literal.push(c);
            continue;
        }
        match chars.next() {
            Some('\\') => literal.push('\\'),
            Some(digit) if digit.is_ascii_digit() => {
                if !literal.is_empty() {
                    parts.push(SubstitutionPart::Text(std::mem::take(&mut literal).into()));
                }
                parts.push(SubstitutionPart::Group(digit as usize - '0' as usize));
            }
            _ => {
                return Err(format!(
                    "`{text}`: a backslash must be followed by a digit or a backslash"
                ));
            }
        }
    }
    if !literal.is_empty() {
        parts.push(SubstitutionPart::Text(literal.into()));
    }
    Ok(Substitution(parts))
}

/// `StringMatcher`.
pub(super) fn string_matcher(at: At<'_>, m: &matcher::StringMatcher) -> Step<StringMatcher> {
    use matcher::string_matcher::MatchPattern as P;
    let some = |name: &str, text: &str| at.text(name, text).map(|t| Box::from(&*t));
    let pattern = match &m.match_pattern {
        Some(P::Exact(text)) => StringPattern::Exact(text.as_str().into()),
        Some(P::Prefix(text)) => StringPattern::Prefix(some("prefix", text)?),
        Some(P::Suffix(text)) => StringPattern::Suffix(some("suffix", text)?),
        Some(P::Contains(text)) => StringPattern::Contains(some("contains", text)?),
        Some(P::SafeRegex(m)) => StringPattern::Regex(regex(at.field("safe_regex"), m)?),
        Some(P::Custom(_)) => {
            return Err(at
                .field("custom")
                .not_implemented("is not implemented; remove it"));
        }
        None => {
            return Err(at.error("needs one of exact, prefix, suffix, contains, safe_regex"));
        }
    };
    if m.ignore_case && matches!(pattern, StringPattern::Regex(_)) {
        at.field("ignore_case")
            .error("has no effect on safe_regex; write (?i) into the expression");
    }
    Ok(StringMatcher {
        pattern,
        ignore_case: m.ignore_case,
    })
}

/// `HeaderMatcher`.
pub(super) fn header_matcher(at: At<'_>, m: &route::HeaderMatcher) -> Step<HeaderMatcher> {
    use route::header_matcher::HeaderMatchSpecifier as S;
    let route::HeaderMatcher {
        name,
        invert_match,
        treat_missing_header_as_empty,
        header_match_specifier,
    } = m;
    let name = header_name(&at, "name", name)?;
    let plain = |pattern| {
        HeaderCondition::Text(StringMatcher {
            pattern,
            ignore_case: false,
        })
    };
    let condition = match header_match_specifier {
        None => HeaderCondition::Present(true),
        Some(S::PresentMatch(present)) => HeaderCondition::Present(*present),
        Some(S::StringMatch(m)) => {
            HeaderCondition::Text(string_matcher(at.field("string_match"), m)?)
        }
        // An empty text of the deprecated form only asks whether the header is there.
        Some(S::ExactMatch(text)) if text.is_empty() => plain(StringPattern::Prefix("".into())),
        Some(S::ExactMatch(text)) => plain(StringPattern::Exact(text.as_str().into())),
        Some(S::PrefixMatch(text)) => plain(StringPattern::Prefix(text.as_str().into())),
        Some(S::SuffixMatch(text)) => plain(StringPattern::Suffix(text.as_str().into())),
        Some(S::ContainsMatch(text)) => plain(StringPattern::Contains(text.as_str().into())),
        Some(S::SafeRegexMatch(m)) => plain(StringPattern::Regex(regex(
            at.field("safe_regex_match"),
            m,
        )?)),
        Some(S::RangeMatch(range)) => HeaderCondition::Range(range.start..range.end),
    };
    Ok(HeaderMatcher {
        joined: Joined::of(&name),
        name,
        condition,
        invert: *invert_match,
        missing_as_empty: *treat_missing_header_as_empty,
    })
}

/// A header name in lower case.
pub(super) fn header_name(at: &At<'_>, field: &str, name: &str) -> Step<Arc<str>> {
    let name = at.text(field, name)?;
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let bare = name.strip_prefix(':').unwrap_or(&name);
    if bare.is_empty() || !bare.bytes().all(legal) {
        return Err(at
            .field(field)
            .error(format!("`{name}` is not a header name")));
    }
    Ok(name.to_ascii_lowercase().into())
}

/// `QueryParameterMatcher`.
pub(super) fn query_matcher(at: At<'_>, m: &route::QueryParameterMatcher) -> Step<QueryMatcher> {
    use route::query_parameter_matcher::QueryParameterMatchSpecifier as S;
    let name = at.text("name", &m.name)?;
    let condition = match &m.query_parameter_match_specifier {
        None => QueryCondition::Present(true),
        Some(S::PresentMatch(present)) => QueryCondition::Present(*present),
        Some(S::StringMatch(m)) => {
            QueryCondition::Text(string_matcher(at.field("string_match"), m)?)
        }
    };
    Ok(QueryMatcher {
        name: (*name).into(),
        condition,
    })
}

/// `MetadataMatcher`.
pub(super) fn metadata_matcher(at: At<'_>, m: &matcher::MetadataMatcher) -> Step<MetadataMatcher> {
    use matcher::metadata_matcher::path_segment::Segment;
    let filter = at.text("filter", &m.filter)?;
    let path = at.each("path", &m.path, |at, m| match &m.segment {
        Some(Segment::Key(key)) => at.text("key", key),
        None => Err(at.field("key").error("is required")),
    });
    let value = at.required("value", &m.value, value_matcher)?;
    Ok(MetadataMatcher {
        filter,
        path,
        value,
        invert: m.invert,
    })
}

/// `AddressMatcher`.
pub(super) fn address_matcher(at: At<'_>, m: &matcher::AddressMatcher) -> Step<AddressMatcher> {
    let matcher::AddressMatcher {
        ranges,
        invert_match,
    } = m;
    Ok(AddressMatcher {
        ranges: at.each("ranges", ranges, |at, m| {
            let same = core::CidrRange {
                address_prefix: m.address_prefix.clone(),
                prefix_len: m.prefix_len,
            };
            cidr(at, &same)
        }),
        invert: *invert_match,
    })
}

/// `CookieMatcher`.
pub(super) fn cookie_matcher(at: At<'_>, m: &route::CookieMatcher) -> Step<CookieMatcher> {
    let route::CookieMatcher {
        name,
        string_match,
        invert_match,
    } = m;
    Ok(CookieMatcher {
        name: (*at.text("name", name)?).into(),
        value: at.required("string_match", string_match, string_matcher)?,
        invert: *invert_match,
    })
}

/// `FilterStateMatcher`.
pub(super) fn filter_state_matcher(
    at: At<'_>,
    m: &matcher::FilterStateMatcher,
) -> Step<FilterStateMatcher> {
    use matcher::filter_state_matcher::Matcher as M;
    let condition = match &m.matcher {
        Some(M::StringMatch(m)) => {
            FilterStateCondition::Text(string_matcher(at.field("string_match"), m)?)
        }
        Some(M::AddressMatch(m)) => {
            FilterStateCondition::Address(address_matcher(at.field("address_match"), m)?)
        }
        None => return Err(at.error("needs one of string_match, address_match")),
    };
    Ok(FilterStateMatcher {
        key: at.text("key", &m.key)?,
        condition,
    })
}

fn value_matcher(at: At<'_>, m: &matcher::ValueMatcher) -> Step<ValueMatcher> {
    use matcher::{
        double_matcher::MatchPattern as D, list_matcher::MatchPattern as L,
        value_matcher::MatchPattern as P,
    };
    let finite = |number| Finite::new(number).ok_or_else(|| at.error("must be a finite number"));
    match &m.match_pattern {
        Some(P::NullMatch(_)) => Ok(ValueMatcher::Null),
        Some(P::DoubleMatch(m)) => match &m.match_pattern {
            Some(D::Range(range)) => Ok(ValueMatcher::Range(
                finite(range.start)?,
                finite(range.end)?,
            )),
            Some(D::Exact(number)) => Ok(ValueMatcher::Number(finite(*number)?)),
            None => Err(at.field("double_match").error("needs one of range, exact")),
        },
        Some(P::StringMatch(m)) => Ok(ValueMatcher::Text(string_matcher(
            at.field("string_match"),
            m,
        )?)),
        Some(P::BoolMatch(want)) => Ok(ValueMatcher::Bool(*want)),
        Some(P::PresentMatch(present)) => Ok(ValueMatcher::Present(*present)),
        Some(P::ListMatch(m)) => {
            let at = at.field("list_match");
            match &m.match_pattern {
                Some(L::OneOf(m)) => Ok(ValueMatcher::OneOf(Box::new(value_matcher(
                    at.field("one_of"),
                    m,
                )?))),
                None => Err(at.error("needs one_of")),
            }
        }
        Some(P::OrMatch(m)) => {
            let any = at
                .field("or_match")
                .each("value_matchers", &m.value_matchers, value_matcher);
            Ok(ValueMatcher::Or(any))
        }
        None => Err(at.error("needs a condition such as string_match")),
    }
}
