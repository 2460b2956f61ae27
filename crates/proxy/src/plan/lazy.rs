//! Plans that are made when somebody asks for them.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;

use super::{
    Address, Cluster, ClusterLoadAssignment, bootstrap::ConfigSource, cluster::Discovery,
    endpoint::HealthStatus, read, route::VirtualHost, tls::SdsSecret,
};
use crate::transport::{self, Source};

/// A virtual host, planned once to find what is wrong with it and, where there are many, again at its first request:
/// between the two it is its encoding, a tenth of its plan.
#[derive(Clone)]
pub struct LazyVirtualHost {
    /// Empty where the plan was kept.
    encoded: Bytes,
    /// `max_direct_response_body_size_bytes` of its route configuration.
    body_limit: u32,
    plan: OnceLock<Box<VirtualHost>>,
}

impl LazyVirtualHost {
    /// What has this encoding, and was planned without an error.
    pub(crate) fn later(encoded: Bytes, body_limit: usize) -> Self {
        Self {
            encoded,
            body_limit: u32::try_from(body_limit).unwrap_or(u32::MAX),
            plan: OnceLock::new(),
        }
    }
}

impl From<VirtualHost> for LazyVirtualHost {
    fn from(plan: VirtualHost) -> Self {
        Self {
            encoded: Bytes::new(),
            body_limit: 0,
            plan: OnceLock::from(Box::new(plan)),
        }
    }
}

impl Deref for LazyVirtualHost {
    type Target = VirtualHost;

    fn deref(&self) -> &VirtualHost {
        self.plan
            .get_or_init(|| Box::new(read::virtual_host(&self.encoded, self.body_limit as usize)))
    }
}

/// The same encoding is the same plan; else the plans are compared.
impl PartialEq for LazyVirtualHost {
    fn eq(&self, other: &Self) -> bool {
        let same = !self.encoded.is_empty()
            && (&self.encoded, self.body_limit) == (&other.encoded, other.body_limit);
        same || **self == **other
    }
}

impl Eq for LazyVirtualHost {}

impl fmt::Debug for LazyVirtualHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A cluster, planned once to find what is wrong with it and again when somebody asks: between the two it is its encoding.
///
/// What the main thread asks of every cluster is kept beside it. A cluster that the main thread works with (names to
/// resolve, hosts to check or to put aside) keeps its plan.
#[derive(Clone)]
pub struct LazyCluster {
    /// Unique name.
    pub name: Arc<str>,
    alt_stat_name: Option<Arc<str>>,
    /// Empty where the plan was kept.
    encoded: Bytes,
    /// Where its endpoints are asked for.
    eds: Option<Box<(Arc<str>, ConfigSource)>>,
    /// What its TLS contexts need.
    needs: Box<[Source]>,
    /// How many hosts its own endpoints are.
    own: HostCounts,
    plan: OnceLock<Arc<Cluster>>,
}

/// How many hosts there are, by what discovery says of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounts {
    /// All.
    pub total: u32,
    /// That may get requests.
    pub healthy: u32,
    /// That get requests when healthy ones do not suffice.
    pub degraded: u32,
}

impl HostCounts {
    /// Of the endpoints that are addresses; names are no hosts before they are resolved.
    pub fn of(assignment: &ClusterLoadAssignment) -> Self {
        let mut counts = Self::default();
        for (_, endpoint) in assignment.endpoints() {
            if matches!(endpoint.address, Address::Name { .. }) {
                continue;
            }
            counts.total += 1;
            counts.healthy += u32::from(endpoint.health.is_healthy());
            counts.degraded += u32::from(endpoint.health == HealthStatus::Degraded);
        }
        counts
    }
}

impl LazyCluster {
    /// What has this encoding, and was planned without an error.
    pub(crate) fn later(plan: Cluster, encoded: Bytes) -> Self {
        let mut lazy = Self::from(plan);
        if lazy.made().is_some_and(|plan| rests(plan)) {
            lazy.plan = OnceLock::new();
            lazy.encoded = encoded;
        }
        lazy
    }

    /// The plan, made now where nobody has asked before.
    pub fn plan(&self) -> &Arc<Cluster> {
        self.plan
            .get_or_init(|| Arc::new(read::cluster(&self.encoded)))
    }

    /// The plan where it is there. A cluster without one has its endpoints from EDS or from its configuration, and nobody
    /// checks its hosts or puts them aside.
    pub fn made(&self) -> Option<&Arc<Cluster>> {
        self.plan.get()
    }

    /// The plan for a look: made, and not kept, where nobody has asked before.
    pub fn look(&self) -> Arc<Cluster> {
        self.made()
            .cloned()
            .unwrap_or_else(|| Arc::new(read::cluster(&self.encoded)))
    }

    /// Whether the plan was kept from the start, since the main thread works with it.
    pub(crate) fn is_kept(&self) -> bool {
        self.encoded.is_empty()
    }

    /// The name under `cluster.` in stats.
    pub fn stat_name(&self) -> &Arc<str> {
        self.alt_stat_name.as_ref().unwrap_or(&self.name)
    }

    /// The service name that EDS is asked for, and where.
    pub fn eds(&self) -> Option<(&Arc<str>, &ConfigSource)> {
        self.eds
            .as_deref()
            .map(|(service, source)| (service, source))
    }

    /// What its TLS contexts need.
    pub(crate) fn needs(&self) -> &[Source] {
        &self.needs
    }

    /// The secrets that its TLS contexts need.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = &SdsSecret> {
        self.needs.iter().filter_map(|source| match source {
            Source::Sds(secret) => Some(secret),
            _ => None,
        })
    }

    /// How many hosts its own endpoints are.
    pub(crate) fn own_hosts(&self) -> HostCounts {
        self.own
    }
}

/// Whether the main thread has no work with a cluster.
fn rests(plan: &Cluster) -> bool {
    let found = matches!(plan.discovery, Discovery::Static(_) | Discovery::Eds { .. });
    found && plan.outlier_detection.is_none() && plan.health_check.is_none()
}

impl From<Cluster> for LazyCluster {
    fn from(plan: Cluster) -> Self {
        let eds = match &plan.discovery {
            Discovery::Eds {
                service_name,
                source,
            } => Some(Box::new((service_name.clone(), source.clone()))),
            _ => None,
        };
        let own = match &plan.discovery {
            Discovery::Static(assignment) => HostCounts::of(assignment),
            _ => HostCounts::default(),
        };
        Self {
            name: plan.name.clone(),
            alt_stat_name: plan.alt_stat_name.clone(),
            encoded: Bytes::new(),
            eds,
            needs: transport::of_cluster(&plan).into(),
            own,
            plan: OnceLock::from(Arc::new(plan)),
        }
    }
}

/// The same encoding is the same plan; else the plans are compared.
impl PartialEq for LazyCluster {
    fn eq(&self, other: &Self) -> bool {
        let same = !self.encoded.is_empty() && self.encoded == other.encoded;
        same || self.look() == other.look()
    }
}

impl Eq for LazyCluster {}

impl fmt::Debug for LazyCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.made() {
            Some(plan) => plan.fmt(f),
            None => f.debug_tuple("Cluster").field(&self.name).finish(),
        }
    }
}
