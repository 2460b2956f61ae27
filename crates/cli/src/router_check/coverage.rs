//! How much of a route configuration the tests look at, counted as Envoy's tool counts it.

use std::collections::BTreeMap;

use proxy::{
    plan::{
        RouteConfiguration,
        route::{Action, ClusterSpecifier},
    },
    router::check::Place,
};

use super::document::Assertion;

/// What tests that were met have looked at, by route; each entry of weighted clusters counts as a route.
#[derive(Debug, Default)]
pub(super) struct Coverage(BTreeMap<Place, u8>);

impl Coverage {
    /// Takes note of an expectation that was met.
    pub(super) fn met(&mut self, routes: &RouteConfiguration, place: Place, of: &Assertion) {
        let bit = match (is_reply(routes, place), of) {
            (false, Assertion::ClusterName(_)) => 0,
            (false, Assertion::VirtualClusterName(_)) => 1,
            (false, Assertion::VirtualHostName(_)) => 2,
            (false, Assertion::PathRewrite(_)) => 3,
            (false, Assertion::HostRewrite(_)) => 4,
            (true, Assertion::PathRedirect(_)) => 0,
            (true, Assertion::CodeRedirect(_)) => 1,
            _ => return,
        };
        *self.0.entry(place).or_default() |= 1 << bit;
    }

    /// The share of routes that some test looks at, in percent; `all`: each by the share of its fields that one does.
    pub(super) fn percent(&self, routes: &RouteConfiguration, all: bool) -> f64 {
        let total = places(routes).count();
        let covered: f64 = self
            .0
            .iter()
            .map(|(place, bits)| match (all, is_reply(routes, *place)) {
                (false, _) => 1.0,
                (true, true) => f64::from(bits.count_ones()) / 2.0,
                (true, false) => f64::from(bits.count_ones()) / 5.0,
            })
            .sum();
        100.0 * covered / total.max(1) as f64
    }

    /// The routes that no test looks at, a line each.
    pub(super) fn missing(&self, routes: &RouteConfiguration) -> Vec<String> {
        let known = |place: &Place| {
            self.0
                .keys()
                .any(|k| (k.virtual_host, k.route) == (place.virtual_host, place.route))
        };
        let mut places: Vec<Place> = places(routes).filter(|place| !known(place)).collect();
        places.dedup_by_key(|place| (place.virtual_host, place.route));
        let line = |place: Place| {
            let (host, route) = routes.route_at(place.virtual_host, place.route)?;
            let name = match &*route.name {
                "" => String::new(),
                name => format!(" `{name}`"),
            };
            let index = place.route;
            Some(format!(
                "Missing test for host: {}, route: routes[{index}]{name}",
                host.name
            ))
        };
        places.into_iter().filter_map(line).collect()
    }
}

/// Whether a route redirects or answers.
fn is_reply(routes: &RouteConfiguration, place: Place) -> bool {
    let route = routes.route_at(place.virtual_host, place.route);
    route.is_some_and(|(_, r)| matches!(r.action, Action::Redirect(_) | Action::DirectResponse(_)))
}

fn places(routes: &RouteConfiguration) -> impl Iterator<Item = Place> {
    let hosts = (0..).zip(routes.virtual_hosts.iter());
    hosts.flat_map(|(virtual_host, host)| {
        (0..).zip(host.routes.iter()).flat_map(move |(route, r)| {
            let entries = match &r.action {
                Action::Route(action) => match &action.cluster {
                    ClusterSpecifier::Weighted(clusters) => Some(clusters.clusters.len()),
                    _ => None,
                },
                _ => None,
            };
            let weighted: Vec<Option<usize>> = match entries {
                Some(count) => (0..count).map(Some).collect(),
                None => vec![None],
            };
            weighted.into_iter().map(move |weighted| Place {
                virtual_host,
                route,
                weighted,
            })
        })
    })
}
