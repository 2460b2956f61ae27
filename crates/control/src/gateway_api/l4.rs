//! Rules of TLSRoutes and TCPRoutes.

use config::gateway_api::{BackendRef, L4Rule};
use proto::istio::networking::v1alpha3::{
    Destination, PortSelector, RouteDestination, TcpRoute, TlsMatchAttributes, TlsRoute,
};

use super::{
    Fault,
    http::{Referrer, Rules, destination, weight},
};
use crate::model::host;

/// The rules of a TCPRoute.
pub(super) fn tcp(of: Referrer<'_>, rules: &[L4Rule]) -> Rules<TcpRoute> {
    Rules::collect(rules.iter().map(|rule| {
        let (route, fault) = backends(of, &rule.backend_refs)?;
        let rule = TcpRoute {
            route,
            ..TcpRoute::default()
        };
        Ok((rule, fault))
    }))
}

/// The rules of a TLSRoute for these SNI hosts.
pub(super) fn tls(of: Referrer<'_>, rules: &[L4Rule], hostnames: &[String]) -> Rules<TlsRoute> {
    Rules::collect(rules.iter().map(|rule| {
        let (route, fault) = backends(of, &rule.backend_refs)?;
        let sni_hosts = if hostnames.is_empty() {
            vec!["*".to_owned()]
        } else {
            hostnames.to_vec()
        };
        let rule = TlsRoute {
            r#match: vec![TlsMatchAttributes {
                sni_hosts,
                ..TlsMatchAttributes::default()
            }],
            route,
        };
        Ok((rule, fault))
    }))
}

/// For the mesh: hosts that were not named are those of the service, and a port that was named counts.
pub(super) fn for_service(
    rules: &[TlsRoute],
    port: Option<u32>,
    hosts: &[String],
) -> Vec<TlsRoute> {
    let mut out = rules.to_vec();
    for m in out.iter_mut().flat_map(|r| &mut r.r#match) {
        if m.sni_hosts == ["*"] {
            m.sni_hosts = hosts.to_vec();
        }
        if let Some(port) = port {
            m.port = port;
        }
    }
    out
}

/// Only the SNI hosts that the listener means too.
pub(super) fn for_listener(rules: &[TlsRoute], hostname: &str) -> Vec<TlsRoute> {
    let listener = [hostname.to_owned()];
    let mut out = rules.to_vec();
    for m in out.iter_mut().flat_map(|r| &mut r.r#match) {
        m.sni_hosts = intersection(&m.sni_hosts, &listener);
    }
    out.retain(|r| r.r#match.iter().any(|m| !m.sni_hosts.is_empty()));
    out
}

/// Hosts that both lists mean: of two that overlap the narrower one.
pub(super) fn intersection(a: &[String], b: &[String]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for (a, b) in a.iter().flat_map(|a| b.iter().map(move |b| (a, b))) {
        let both = if host::subset_of(a, b) {
            a
        } else if host::subset_of(b, a) {
            b
        } else {
            continue;
        };
        if !out.contains(both) {
            out.push(both.clone());
        }
    }
    out
}

fn backends(
    of: Referrer<'_>,
    all: &[BackendRef],
) -> Result<(Vec<RouteDestination>, Option<Fault>), Fault> {
    let counted: Vec<&BackendRef> = all.iter().filter(|b| b.weight > 0).collect();
    if counted.is_empty() {
        // A cluster that does not exist: the connection is closed.
        let nowhere = Destination {
            host: "internal.cluster.local".to_owned(),
            subset: "zero-weight".to_owned(),
            port: Some(PortSelector { number: 65535 }),
        };
        let route = RouteDestination {
            destination: Some(nowhere),
            weight: 0,
        };
        return Ok((vec![route], None));
    }
    let mut found = None;
    let mut out = Vec::new();
    for to in &counted {
        let (destination, fault) = destination(of, to)?;
        found = fault.or(found);
        out.push(RouteDestination {
            destination: Some(destination),
            weight: weight(to.weight, counted.len()),
        });
    }
    Ok((out, found))
}
