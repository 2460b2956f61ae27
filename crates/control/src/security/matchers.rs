//! Envoy's matchers from the strings of policies: `*` alone, at the front or at the end is a wildcard.

use proto::envoy::{
    config::route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier},
    r#type::matcher::v3::{
        ListMatcher, MetadataMatcher, OrMatcher, RegexMatcher, StringMatcher, ValueMatcher,
        list_matcher,
        metadata_matcher::{PathSegment, path_segment},
        string_matcher::MatchPattern,
        value_matcher,
    },
};

/// A value as AuthorizationPolicy means it. `*` is "anything but nothing".
pub(crate) fn string(value: &str) -> StringMatcher {
    with_prefix(value, "")
}

/// The same for values that are matched behind a fixed prefix, such as `spiffe://`.
pub(crate) fn with_prefix(value: &str, prefix: &str) -> StringMatcher {
    if value == "*" {
        return regex(".+".to_owned());
    }
    if let Some(end) = value.strip_prefix('*') {
        return if prefix.is_empty() {
            pattern(MatchPattern::Suffix(end.to_owned()))
        } else {
            regex(format!("{prefix}.*{}", quote(end)))
        };
    }
    pattern(match value.strip_suffix('*') {
        Some(start) => MatchPattern::Prefix(format!("{prefix}{start}")),
        None => MatchPattern::Exact(format!("{prefix}{value}")),
    })
}

pub(crate) fn exact(value: &str) -> StringMatcher {
    pattern(MatchPattern::Exact(value.to_owned()))
}

pub(crate) fn prefix(value: &str) -> StringMatcher {
    pattern(MatchPattern::Prefix(value.to_owned()))
}

pub(crate) fn suffix(value: &str) -> StringMatcher {
    pattern(MatchPattern::Suffix(value.to_owned()))
}

pub(crate) fn regex(regex: String) -> StringMatcher {
    pattern(MatchPattern::SafeRegex(RegexMatcher {
        regex,
        ..Default::default()
    }))
}

fn pattern(pattern: MatchPattern) -> StringMatcher {
    StringMatcher {
        match_pattern: Some(pattern),
        ..Default::default()
    }
}

/// Names and values of headers; hosts are compared without case.
pub(crate) fn header(name: &str, value: &str, ignore_case: bool) -> HeaderMatcher {
    let specifier = if value == "*" {
        HeaderMatchSpecifier::PresentMatch(true)
    } else {
        HeaderMatchSpecifier::StringMatch(StringMatcher {
            ignore_case,
            ..string(value)
        })
    };
    HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(specifier),
        ..Default::default()
    }
}

pub(crate) fn string_value(matcher: StringMatcher) -> ValueMatcher {
    value(value_matcher::MatchPattern::StringMatch(matcher))
}

/// A list with an element that `element` takes.
pub(crate) fn list_value(element: ValueMatcher) -> ValueMatcher {
    value(value_matcher::MatchPattern::ListMatch(Box::new(
        ListMatcher {
            match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(element))),
        },
    )))
}

/// What one of `matchers` takes; a single one stays as it is.
pub(crate) fn any_value(mut matchers: Vec<ValueMatcher>) -> ValueMatcher {
    if matchers.len() == 1 {
        return matchers.remove(0);
    }
    value(value_matcher::MatchPattern::OrMatch(OrMatcher {
        value_matchers: matchers,
    }))
}

fn value(pattern: value_matcher::MatchPattern) -> ValueMatcher {
    ValueMatcher {
        match_pattern: Some(pattern),
    }
}

/// A value in the metadata that a filter left behind.
pub(crate) fn metadata(filter: &str, path: &[&str], value: ValueMatcher) -> MetadataMatcher {
    MetadataMatcher {
        filter: filter.to_owned(),
        path: path
            .iter()
            .map(|key| PathSegment {
                segment: Some(path_segment::Segment::Key((*key).to_owned())),
            })
            .collect(),
        value: Some(value),
        invert: false,
    }
}

/// The text as a regular expression that matches it and nothing else. Only characters with a meaning are escaped, as
/// Go's `regexp.QuoteMeta` does it, so that the configuration reads the same.
pub(crate) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
