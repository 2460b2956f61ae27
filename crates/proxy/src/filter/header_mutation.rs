//! `envoy.filters.http.header_mutation`: changes heads in one order, by the filter and by every level of the route.

use std::sync::Arc;

use outrigger_http::{Headers, ResponseHead};

use super::{Filter, Interests, Step, route_configs};
use crate::{
    http::Exchange,
    plan::{
        filter_config::{HeaderMutationFilter, Mutations, QueryMutation},
        header::AppendAction,
        http_filter::RouteFilterConfig,
    },
    router::headers,
    worker::Worker,
};

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct HeaderMutations {
    pub(super) name: Arc<str>,
    pub(super) config: Arc<HeaderMutationFilter>,
}

impl HeaderMutations {
    /// The filter's mutations, then those of the levels in their order.
    fn all(&self, exchange: &Exchange<'_>) -> Vec<Arc<Mutations>> {
        let route = exchange.route.clone();
        let levels = route_configs(&route, &self.name).filter_map(|config| match config {
            RouteFilterConfig::HeaderMutation(mutations) => Some(mutations.clone()),
            _ => None,
        });
        let mut all: Vec<_> = levels.collect();
        if self.config.most_specific_wins {
            all.reverse();
        }
        all.insert(0, self.config.mutations.clone());
        all
    }
}

impl Filter for HeaderMutations {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        for mutations in self.all(exchange) {
            headers::mutate_request(&mutations.request, exchange);
            if !mutations.query.is_empty() {
                let path = query(exchange.request.path(), &mutations.query);
                exchange.request.set_path(&path);
            }
        }
        Step::Continue
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        for mutations in self.all(exchange) {
            headers::mutate_response(&mutations.response, exchange, &mut response.headers);
        }
    }

    fn trailers(&self, exchange: &mut Exchange<'_>, trailers: &mut Headers) {
        for mutations in self.all(exchange) {
            headers::mutate_response(&mutations.response_trailers, exchange, trailers);
        }
    }
}

/// A path with its query changed.
fn query(path: &str, mutations: &[QueryMutation]) -> String {
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let mut pairs: Vec<(&str, &str)> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .collect();
    for mutation in mutations {
        match mutation {
            QueryMutation::Remove(key) => pairs.retain(|(name, _)| *name != &**key),
            QueryMutation::Append { key, value, action } => {
                let there = pairs.iter().any(|(name, _)| *name == &**key);
                match action {
                    AppendAction::AddIfAbsent if there => continue,
                    AppendAction::OverwriteIfExists if !there => continue,
                    AppendAction::OverwriteIfExists | AppendAction::OverwriteIfExistsOrAdd => {
                        pairs.retain(|(name, _)| *name != &**key);
                    }
                    _ => {}
                }
                pairs.push((key, value));
            }
        }
    }
    let mut out = path.to_owned();
    for (index, (key, value)) in pairs.iter().enumerate() {
        out.push(if index == 0 { '?' } else { '&' });
        out.push_str(key);
        out.push('=');
        out.push_str(value);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_added_set_and_removed() {
        let append = |key: &str, value: &str, action| QueryMutation::Append {
            key: key.into(),
            value: value.into(),
            action,
        };
        let mutations = [
            QueryMutation::Remove("gone".into()),
            append("a", "2", AppendAction::AppendIfExistsOrAdd),
            append("b", "2", AppendAction::AddIfAbsent),
            append("c", "2", AppendAction::OverwriteIfExistsOrAdd),
            append("d", "2", AppendAction::OverwriteIfExists),
        ];
        assert_eq!(
            query("/p?a=1&b=1&c=1&gone=1", &mutations),
            "/p?a=1&b=1&a=2&c=2"
        );
        assert_eq!(query("/p", &mutations[..1]), "/p");
    }
}
