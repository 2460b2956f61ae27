//! Which requests a route takes.

use proto::envoy::{
    config::route::v3 as pb, extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig,
};

use super::common::{
    cookie_matcher, filter_state_matcher, header_matcher, metadata_matcher, query_matcher, regex,
    runtime_fraction, typed_config,
};
use crate::plan::{
    error::{At, Step},
    matcher::RuntimeFraction,
    route::{PathMatch, RouteMatch, TlsMatch},
    uri_template::UriTemplate,
};

/// `RouteMatch`.
pub(super) fn route_match(at: At<'_>, m: &pb::RouteMatch) -> Step<RouteMatch> {
    use pb::route_match::PathSpecifier as P;
    let pb::RouteMatch {
        case_sensitive,
        runtime_fraction: fraction,
        headers,
        query_parameters,
        grpc,
        tls_context,
        dynamic_metadata,
        filter_state,
        path_specifier,
        cookies,
    } = m;
    let path = match path_specifier {
        Some(P::Prefix(text)) => PathMatch::Prefix(text.as_str().into()),
        Some(P::Path(text)) => PathMatch::Path(text.as_str().into()),
        Some(P::SafeRegex(m)) => PathMatch::Regex(regex(at.field("safe_regex"), m)?),
        Some(P::ConnectMatcher(_)) => PathMatch::Connect,
        Some(P::PathSeparatedPrefix(text)) => {
            if text.len() < 2 || text.ends_with('/') || text.contains(['?', '#']) {
                let at = at.field("path_separated_prefix");
                return Err(at.error(format!(
                    "`{text}` must have two characters at least, not end with a slash, and hold no query"
                )));
            }
            PathMatch::PathSeparatedPrefix(text.as_str().into())
        }
        Some(P::PathMatchPolicy(m)) => {
            let at = at.field("path_match_policy");
            let found = typed_config(&at, &m.typed_config, "path match policy")?;
            let at = at.field("typed_config");
            if found.name != "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig" {
                return Err(found.unknown(&at, "path match policy"));
            }
            let m: UriTemplateMatchConfig = found.decode(&at)?;
            PathMatch::Template(
                UriTemplate::parse(&m.path_template)
                    .map_err(|why| at.field("path_template").error(why))?,
            )
        }
        None => {
            return Err(at.error(
                "needs one of prefix, path, path_separated_prefix, safe_regex, connect_matcher",
            ));
        }
    };
    Ok(RouteMatch {
        path,
        case_sensitive: case_sensitive.unwrap_or(true),
        headers: at.each("headers", headers, header_matcher),
        query_parameters: at.each("query_parameters", query_parameters, query_matcher),
        cookies: at.each("cookies", cookies, cookie_matcher),
        grpc: grpc.is_some(),
        runtime_fraction: at.optional("runtime_fraction", fraction, |at, m| {
            Ok(RuntimeFraction {
                key: m.runtime_key.as_str().into(),
                default: runtime_fraction(at, m)?,
            })
        })?,
        tls: tls_context.as_ref().map(|m| TlsMatch {
            presented: m.presented,
            validated: m.validated,
        }),
        dynamic_metadata: at.each("dynamic_metadata", dynamic_metadata, metadata_matcher),
        filter_state: at.each("filter_state", filter_state, filter_state_matcher),
    })
}
