//! `xds.type.matcher.v3.Matcher`, whatever its actions are.

use proto::{
    envoy::{
        config::core::v3 as core,
        extensions::matching::input_matchers::ip::v3::Ip,
        r#type::matcher::v3::{self as matcher, HttpRequestHeaderMatchInput},
    },
    xds::{core::v3::TypedExtensionConfig, r#type::matcher::v3 as pb},
};

use super::common::{Extension, cidr, header_name, string_matcher, typed_config};
use crate::plan::{
    error::{At, Step},
    matcher::StringMatcher,
    matcher_tree::{Branches, Condition, Input, Matcher, OnMatch, PeerName, Predicate, Target},
};

/// Turns an action's extension into the holder's type.
type Convert<'c, A> = &'c mut dyn FnMut(At<'_>, &Extension<'_>) -> Step<A>;

/// A whole matcher. Its depth is that of the message, which the decoder limits.
pub(super) fn matcher<A>(at: At<'_>, m: &pb::Matcher, convert: Convert<'_, A>) -> Step<Matcher<A>> {
    use pb::matcher::{MatcherType as M, matcher_tree::TreeType as T};
    let branches = match &m.matcher_type {
        None => Branches::None,
        Some(M::MatcherList(list)) => {
            let at = at.field("matcher_list");
            Branches::List(at.each("matchers", &list.matchers, |at, m| {
                let predicate = at.required("predicate", &m.predicate, predicate)?;
                let on_match =
                    at.required("on_match", &m.on_match, |at, m| on_match(at, m, convert))?;
                Ok((predicate, on_match))
            }))
        }
        Some(M::MatcherTree(tree)) => {
            let at = at.field("matcher_tree");
            let input = at.required("input", &tree.input, input)?;
            match &tree.tree_type {
                Some(T::ExactMatchMap(m)) => {
                    Branches::Exact(input, match_map(at.field("exact_match_map"), m, convert))
                }
                Some(T::PrefixMatchMap(m)) => {
                    let map = match_map(at.field("prefix_match_map"), m, convert);
                    let mut list: Vec<_> = map.into_iter().collect();
                    list.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
                    Branches::Prefix(input, list)
                }
                Some(T::CustomMatch(_)) => {
                    return Err(at.field("custom_match").not_implemented(
                        "is not implemented; write exact_match_map or prefix_match_map",
                    ));
                }
                None => {
                    return Err(at.error("needs one of exact_match_map, prefix_match_map"));
                }
            }
        }
    };
    let on_no_match = at.optional("on_no_match", &m.on_no_match, |at, m| {
        on_match(at, m, convert)
    })?;
    Ok(Matcher {
        branches,
        on_no_match: on_no_match.map(Box::new),
    })
}

fn match_map<A>(
    at: At<'_>,
    m: &pb::matcher::matcher_tree::MatchMap,
    convert: Convert<'_, A>,
) -> std::collections::BTreeMap<Box<[u8]>, OnMatch<A>> {
    let at = at.field("map");
    if m.map.is_empty() {
        at.error("needs at least one entry");
    }
    m.map
        .iter()
        .filter_map(|(key, m)| {
            let target = on_match(at.key(key), m, convert).ok()?;
            Some((key.as_bytes().into(), target))
        })
        .collect()
}

fn on_match<A>(at: At<'_>, m: &pb::matcher::OnMatch, convert: Convert<'_, A>) -> Step<OnMatch<A>> {
    use pb::matcher::on_match::OnMatch as O;
    let target = match &m.on_match {
        Some(O::Matcher(m)) => Target::Matcher(Box::new(matcher(at.field("matcher"), m, convert)?)),
        Some(O::Action(m)) => {
            let at = at.field("action");
            let found = typed_config(&at, &m.typed_config, "action")?;
            Target::Action(convert(at.field("typed_config"), &found)?)
        }
        None => return Err(at.error("needs one of matcher, action")),
    };
    Ok(OnMatch {
        target,
        keep_matching: m.keep_matching,
    })
}

fn predicate(at: At<'_>, m: &pb::matcher::matcher_list::Predicate) -> Step<Predicate> {
    use pb::matcher::matcher_list::predicate::{MatchType as M, single_predicate::Matcher as S};
    let list = |at: At<'_>, list: &pb::matcher::matcher_list::predicate::PredicateList| {
        if list.predicate.len() < 2 {
            at.field("predicate").error("needs at least two predicates");
        }
        at.each("predicate", &list.predicate, predicate)
    };
    Ok(match &m.match_type {
        Some(M::SinglePredicate(m)) => {
            let at = at.field("single_predicate");
            let input = at.required("input", &m.input, input)?;
            let condition = match &m.matcher {
                Some(S::ValueMatch(m)) => Condition::Text(text(at.field("value_match"), m)?),
                Some(S::CustomMatch(m)) => custom(at.field("custom_match"), m)?,
                None => return Err(at.error("needs one of value_match, custom_match")),
            };
            Predicate::Single(input, condition)
        }
        Some(M::OrMatcher(m)) => Predicate::Or(list(at.field("or_matcher"), m)),
        Some(M::AndMatcher(m)) => Predicate::And(list(at.field("and_matcher"), m)),
        Some(M::NotMatcher(m)) => Predicate::Not(Box::new(predicate(at.field("not_matcher"), m)?)),
        None => {
            return Err(
                at.error("needs one of single_predicate, or_matcher, and_matcher, not_matcher")
            );
        }
    })
}

/// The same as Envoy's `StringMatcher`, in another package.
fn text(at: At<'_>, m: &pb::StringMatcher) -> Step<StringMatcher> {
    use matcher::string_matcher::MatchPattern as To;
    use pb::string_matcher::MatchPattern as From;
    let match_pattern = match &m.match_pattern {
        Some(From::Exact(text)) => Some(To::Exact(text.clone())),
        Some(From::Prefix(text)) => Some(To::Prefix(text.clone())),
        Some(From::Suffix(text)) => Some(To::Suffix(text.clone())),
        Some(From::Contains(text)) => Some(To::Contains(text.clone())),
        Some(From::SafeRegex(m)) => Some(To::SafeRegex(matcher::RegexMatcher {
            regex: m.regex.clone(),
            ..Default::default()
        })),
        Some(From::Custom(_)) => {
            return Err(at
                .field("custom")
                .not_implemented("is not implemented; remove it"));
        }
        None => None,
    };
    let same = matcher::StringMatcher {
        ignore_case: m.ignore_case,
        match_pattern,
    };
    string_matcher(at, &same)
}

fn custom(at: At<'_>, m: &TypedExtensionConfig) -> Step<Condition> {
    let found = typed_config(&at, &m.typed_config, "input matcher")?;
    let at = at.field("typed_config");
    if found.name != "envoy.extensions.matching.input_matchers.ip.v3.Ip" {
        return Err(found.unknown(&at, "input matcher"));
    }
    let m: Ip = found.decode(&at)?;
    let ranges: &[core::CidrRange] = &m.cidr_ranges;
    Ok(Condition::Ip(at.each("cidr_ranges", ranges, cidr)))
}

fn input(at: At<'_>, m: &TypedExtensionConfig) -> Step<Input> {
    let found = typed_config(&at, &m.typed_config, "input")?;
    let at = at.field("typed_config");
    let network = "envoy.extensions.matching.common_inputs.network.v3.";
    let ssl = "envoy.extensions.matching.common_inputs.ssl.v3.";
    Ok(match found.name.as_str() {
        "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" => {
            let m: HttpRequestHeaderMatchInput = found.decode(&at)?;
            Input::Header(header_name(&at, "header_name", &m.header_name)?)
        }
        "envoy.type.matcher.v3.HttpRequestQueryParamMatchInput" => {
            let m: matcher::HttpRequestQueryParamMatchInput = found.decode(&at)?;
            Input::QueryParameter(at.text("query_param", &m.query_param)?)
        }
        name if name.starts_with(ssl) => Input::Peer(match &name[ssl.len()..] {
            "UriSanInput" => PeerName::Uri,
            "DnsSanInput" => PeerName::Dns,
            "SubjectInput" => PeerName::Subject,
            _ => return Err(found.unknown(&at, "input")),
        }),
        name => match name.strip_prefix(network) {
            Some("DestinationIPInput") => Input::DestinationIp,
            Some("DestinationPortInput") => Input::DestinationPort,
            Some("SourceIPInput") => Input::SourceIp,
            Some("SourcePortInput") => Input::SourcePort,
            Some("ServerNameInput") => Input::ServerName,
            _ => return Err(found.unknown(&at, "input")),
        },
    })
}
