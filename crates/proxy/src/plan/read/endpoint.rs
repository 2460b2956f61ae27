//! Load assignments.

use std::{collections::HashMap, sync::Arc};

use proto::envoy::config::{core::v3 as core, endpoint::v3 as pb};

use super::common::{address, enumeration, fraction, metadata, positive};
use crate::plan::{
    address::Address,
    endpoint::{
        ClusterLoadAssignment, Endpoint, EndpointHealthCheck, HealthStatus, Locality,
        LocalityEndpoints,
    },
    error::{At, Step, unsupported},
    matcher::Fraction,
    metadata::Metadata,
};

/// `ClusterLoadAssignment`; host names are legal in clusters that resolve them.
pub(super) fn load_assignment(
    at: At<'_>,
    m: &pb::ClusterLoadAssignment,
    names: bool,
) -> Step<ClusterLoadAssignment> {
    let pb::ClusterLoadAssignment {
        cluster_name,
        endpoints,
        named_endpoints,
        policy,
    } = m;
    unsupported!(at, named_endpoints);
    // Endpoints of one workload carry equal metadata; they share one plan of it.
    let mut seen = Shared::default();
    let mut localities = at.each("endpoints", endpoints, |at, m| {
        locality_endpoints(at, m, names, &mut seen)
    });
    let mut priorities: Vec<u32> = localities.iter().map(|l| l.priority).collect();
    priorities.sort_unstable();
    priorities.dedup();
    if priorities
        .iter()
        .enumerate()
        .any(|(index, p)| index as u32 != *p)
    {
        at.field("endpoints")
            .error("has a gap in its priorities; they must count up from 0");
    }
    localities.sort_by_key(|l| l.priority);
    for level in localities.chunk_by(|a, b| a.priority == b.priority) {
        let weights = level.iter().filter_map(|l| l.weight);
        fits(
            &at.field("endpoints"),
            weights,
            "the localities of a priority",
        );
    }
    let mut overprovisioning_factor = 140;
    let mut drop_overloads = Vec::new();
    let mut weighted = false;
    let mut stale_after = None;
    if let Some(policy) = policy {
        let at = at.field("policy");
        let pb::cluster_load_assignment::Policy {
            drop_overloads: drops,
            overprovisioning_factor: factor,
            endpoint_stale_after,
            weighted_priority_health,
        } = policy;
        weighted = *weighted_priority_health;
        stale_after = positive(&at, "endpoint_stale_after", endpoint_stale_after)?;
        if *factor == Some(0) {
            at.field("overprovisioning_factor")
                .error("must be at least 1");
        }
        overprovisioning_factor = factor.unwrap_or(140);
        drop_overloads = at.each("drop_overloads", drops, |at, m| {
            let share = at.optional("drop_percentage", &m.drop_percentage, fraction)?;
            Ok((m.category.as_str().into(), share.unwrap_or(Fraction::NONE)))
        });
    }
    Ok(ClusterLoadAssignment {
        cluster_name: at.text("cluster_name", cluster_name)?,
        localities,
        overprovisioning_factor,
        weighted_priority_health: weighted,
        endpoint_stale_after: stale_after,
        drop_overloads,
    })
}

fn locality_endpoints(
    at: At<'_>,
    m: &pb::LocalityLbEndpoints,
    names: bool,
    seen: &mut Shared,
) -> Step<LocalityEndpoints> {
    let pb::LocalityLbEndpoints {
        locality,
        metadata: _,
        lb_endpoints,
        load_balancing_weight,
        priority,
        proximity: _,
        lb_config,
    } = m;
    unsupported!(at, lb_config);
    if *priority > 128 {
        at.field("priority").error("must be at most 128");
    }
    if *load_balancing_weight == Some(0) {
        at.field("load_balancing_weight")
            .error("must be at least 1");
    }
    let weights = lb_endpoints.iter().filter_map(|e| e.load_balancing_weight);
    let lb = at.field("lb_endpoints");
    fits(&lb, weights, "the endpoints of a locality");
    Ok(LocalityEndpoints {
        locality: Arc::new(locality.as_ref().map(locality_of).unwrap_or_default()),
        priority: *priority,
        weight: *load_balancing_weight,
        endpoints: at.each("lb_endpoints", lb_endpoints, |at, m| {
            endpoint(at, m, names, seen)
        }),
    })
}

/// Weights are shares of a sum that has 32 bits on the wire of others as well.
fn fits(at: &At<'_>, weights: impl Iterator<Item = u32>, of: &str) {
    let sum: u64 = weights.map(u64::from).sum();
    if sum > u64::from(u32::MAX) {
        at.error(format!(
            "has weights of {of} whose sum is more than {}",
            u32::MAX
        ));
    }
}

/// `HealthStatus`.
pub(super) fn health_status(m: core::HealthStatus) -> HealthStatus {
    match m {
        core::HealthStatus::Unknown => HealthStatus::Unknown,
        core::HealthStatus::Healthy => HealthStatus::Healthy,
        core::HealthStatus::Unhealthy => HealthStatus::Unhealthy,
        core::HealthStatus::Draining => HealthStatus::Draining,
        core::HealthStatus::Timeout => HealthStatus::Timeout,
        core::HealthStatus::Degraded => HealthStatus::Degraded,
    }
}

/// `Locality`.
pub(super) fn locality_of(m: &core::Locality) -> Locality {
    Locality {
        region: m.region.clone(),
        zone: m.zone.clone(),
        sub_zone: m.sub_zone.clone(),
    }
}

fn endpoint(at: At<'_>, m: &pb::LbEndpoint, names: bool, seen: &mut Shared) -> Step<Endpoint> {
    use pb::lb_endpoint::HostIdentifier as H;
    let pb::LbEndpoint {
        health_status,
        metadata,
        load_balancing_weight,
        host_identifier,
    } = m;
    let health = self::health_status(enumeration(&at, "health_status", *health_status)?);
    if *load_balancing_weight == Some(0) {
        at.field("load_balancing_weight")
            .error("must be at least 1");
    }
    let host = match host_identifier {
        Some(H::Endpoint(m)) => m,
        Some(H::EndpointName(_)) => {
            return Err(at
                .field("endpoint_name")
                .not_implemented("is not implemented; write endpoint"));
        }
        None => return Err(at.field("endpoint").error("is required")),
    };
    let at = at.field("endpoint");
    let pb::Endpoint {
        address: first,
        health_check_config,
        hostname,
        additional_addresses,
        // Endpoints have no stats of their own names, and logs show addresses.
        observability_name: _,
    } = host;
    let host_address = |at: At<'_>, m: &core::Address| match address(at, m, names)? {
        Address::Socket(a) if a.port() == 0 => Err(at.error("needs a port")),
        address => Ok(address),
    };
    Ok(Endpoint {
        address: at.required("address", first, host_address)?,
        additional_addresses: at.each("additional_addresses", additional_addresses, |at, m| {
            at.required("address", &m.address, host_address)
        }),
        hostname: hostname.as_str().into(),
        health,
        weight: load_balancing_weight.unwrap_or(1),
        metadata: seen.share(metadata),
        health_check: at.optional("health_check_config", health_check_config, |at, m| {
            endpoint_health_check(at, m, names)
        })?,
    })
}

fn endpoint_health_check(
    at: At<'_>,
    m: &pb::endpoint::HealthCheckConfig,
    names: bool,
) -> Step<Arc<EndpointHealthCheck>> {
    let pb::endpoint::HealthCheckConfig {
        port_value,
        hostname,
        address: other,
        disable_active_health_check,
    } = m;
    let port = u16::try_from(*port_value)
        .map_err(|_| at.field("port_value").error("must be at most 65535"))?;
    if other.is_some() && names {
        // Envoy says the same of clusters that resolve names.
        at.field("address")
            .error("cannot be given for a cluster that resolves names");
    }
    Ok(Arc::new(EndpointHealthCheck {
        port: Some(port).filter(|port| *port > 0),
        hostname: hostname.as_str().into(),
        address: at.optional("address", other, |at, m| address(at, m, false))?,
        disabled: *disable_active_health_check,
    }))
}

/// Equal metadata of one assignment, planned once.
#[derive(Default)]
struct Shared(HashMap<Vec<u8>, Metadata>);

impl Shared {
    fn share(&mut self, m: &Option<core::Metadata>) -> Metadata {
        let planned = metadata(m);
        if planned.is_empty() {
            return planned;
        }
        let key: Vec<u8> = planned
            .iter()
            .flat_map(|(namespace, value)| [namespace.to_owned(), value.to_string()])
            .flat_map(|text| text.into_bytes().into_iter().chain([0]))
            .collect();
        self.0.entry(key).or_insert(planned).clone()
    }
}
