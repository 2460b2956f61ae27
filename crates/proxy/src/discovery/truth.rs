//! What the control plane said, and what of it is in force.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use proto::envoy::{
    config::{
        endpoint::v3::ClusterLoadAssignment as AssignmentMessage,
        listener::v3::Listener as ListenerMessage, route::v3::RouteConfiguration as RouteMessage,
    },
    extensions::transport_sockets::tls::v3::Secret as SecretMessage,
};
use xds::{
    client::{Received, ReceivedResource},
    type_url::{CDS, EDS, LDS, RDS, SDS},
};

use super::entries::{
    Config, Entry, SECRETS_WAIT, Version, answered, applied, cluster_version, finish, refused,
    take, version,
};
use crate::{
    plan::{
        Bootstrap, ClusterLoadAssignment, LazyCluster, Listener, RouteConfiguration,
        bootstrap::{ConfigSource, ConfigSourceKind},
        network::NetworkFilterConfig,
        tls::{SdsSecret, Secret},
    },
    server::{Change, ChangeError},
    transport,
};

/// Hands a batch to the server; the answer has one entry for each change.
pub type Apply<'a> = dyn FnMut(Vec<Change>) -> Vec<Result<(), ChangeError>> + 'a;

/// How far the start has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Clusters are awaited.
    Clusters,
    /// Listeners are awaited.
    Listeners,
    /// Everything that was awaited is there.
    Live,
}

/// A resource that could not be put in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Its type.
    pub type_url: &'static str,
    /// Its name.
    pub name: String,
    /// Why.
    pub details: String,
}

/// What the control plane said, and what of it is in force.
#[derive(Debug)]
pub struct Truth {
    /// Clusters.
    pub clusters: Config<LazyCluster>,
    /// Listeners.
    pub listeners: Config<Listener>,
    /// Routes by name.
    pub routes: Config<RouteConfiguration>,
    /// Endpoints by service name.
    pub endpoints: Config<ClusterLoadAssignment>,
    /// Secrets by name and by where they are asked for.
    pub secrets: BTreeMap<SdsSecret, Entry<Secret>>,
    /// Names that the control plane answered without a resource: waiting for them is over.
    absent: BTreeSet<(&'static str, String)>,
    absent_secrets: BTreeSet<SdsSecret>,
    wanted_secrets: BTreeSet<SdsSecret>,
    /// Clusters or listeners have changed since they were gathered.
    wants_stale: bool,
    failures: Vec<Failure>,
    /// Whether something may be warming; where nothing is, ten thousand entries need not be asked.
    unsettled: bool,
    /// Whether clusters or listeners, and with them the names to ask for, may have changed.
    names_changed: bool,
    listeners_begun: bool,
    phase: Phase,
    waits_for_clusters: bool,
    waits_for_listeners: bool,
    /// When waiting for a first response ends in any case.
    cds_deadline: Option<Instant>,
    lds_deadline: Option<Instant>,
    lds_timeout: Option<Duration>,
    /// When this began, for static resources.
    began: SystemTime,
}

impl Truth {
    /// What the bootstrap fixes. [`Truth::begin`] puts it in force.
    pub fn new(bootstrap: &Bootstrap, now: Instant) -> Self {
        let began = SystemTime::now();
        let timeout = |s: &Option<ConfigSource>| s.as_ref().and_then(|s| s.initial_fetch_timeout);
        let mut truth = Self {
            clusters: Config::default(),
            listeners: Config::default(),
            routes: Config::default(),
            endpoints: Config::default(),
            secrets: BTreeMap::new(),
            absent: BTreeSet::new(),
            absent_secrets: BTreeSet::new(),
            wanted_secrets: BTreeSet::new(),
            wants_stale: true,
            failures: Vec::new(),
            unsettled: true,
            names_changed: true,
            listeners_begun: false,
            phase: Phase::Clusters,
            waits_for_clusters: bootstrap.cds.is_some(),
            waits_for_listeners: bootstrap.lds.is_some(),
            cds_deadline: timeout(&bootstrap.cds).map(|t| now + t),
            lds_deadline: None,
            lds_timeout: timeout(&bootstrap.lds),
            began,
        };
        for (plan, encoded) in &bootstrap.static_clusters {
            let entry = truth.fixed(plan, encoded);
            truth.clusters.entries.insert(plan.name.clone(), entry);
        }
        for (plan, encoded) in &bootstrap.static_listeners {
            let entry = truth.fixed(plan, encoded);
            truth.listeners.entries.insert(plan.name.clone(), entry);
        }
        truth
    }

    fn fixed<T>(&self, plan: &Arc<T>, encoded: &Bytes) -> Entry<T> {
        let version = Version {
            plan: plan.clone(),
            resource: encoded.clone(),
            version: "".into(),
            updated: self.began,
        };
        Entry {
            fixed: true,
            warming: Some(Box::new(version)),
            ..Entry::default()
        }
    }

    /// Puts the static clusters in force; those with EDS warm.
    pub fn begin_clusters(&mut self, now: Instant, apply: &mut Apply<'_>) {
        for entry in self.clusters.entries.values_mut() {
            entry.deadline = entry
                .warming
                .as_ref()
                .and_then(|v| cluster_deadline(&v.plan, now));
            entry.secrets_deadline = entry
                .warming
                .as_ref()
                .and_then(|v| patience(v.plan.secrets(), now));
        }
        self.settle(now, apply);
    }

    /// Puts the static listeners in force; those with RDS warm. Called when names of clusters had time to resolve.
    pub fn begin_listeners(&mut self, now: Instant, apply: &mut Apply<'_>) {
        for entry in self.listeners.entries.values_mut() {
            entry.deadline = entry
                .warming
                .as_ref()
                .and_then(|v| listener_deadline(&v.plan, now));
            entry.secrets_deadline = entry
                .warming
                .as_ref()
                .and_then(|v| patience(transport::secrets_of_listener(&v.plan), now));
        }
        self.listeners_begun = true;
        self.settle(now, apply);
        self.advance(now);
    }

    /// Takes a response in and applies it. The errors are by resource name, for the answer.
    pub fn receive(
        &mut self,
        received: &Received,
        now: Instant,
        apply: &mut Apply<'_>,
    ) -> Vec<(String, String)> {
        if received.malformed.is_some() {
            return Vec::new();
        }
        // What waits is there; what was replaced or removed is gone.
        if matches!(received.type_url.as_str(), CDS | LDS) {
            self.wants_stale = true;
            self.unsettled = true;
            self.names_changed = true;
        }
        let mut errors = match received.type_url.as_str() {
            CDS => self.receive_clusters(received, now, apply),
            LDS => self.receive_listeners(received, now, apply),
            EDS => self.receive_endpoints(received, apply),
            RDS => self.receive_routes(received, apply),
            SDS => self.receive_secrets(received, &ConfigSourceKind::Ads, apply),
            _ => Vec::new(),
        };
        // As with a refused version: nobody waits for it any longer.
        for kind in [EDS, RDS].into_iter().filter(|k| *k == received.type_url) {
            let names = received.refused.iter().map(|(name, _)| name);
            self.absent.extend(names.map(|name| (kind, name.clone())));
        }
        self.settle(now, apply);
        self.failures.retain(|f| {
            let own = f.type_url == received.type_url;
            if own {
                errors.push((f.name.clone(), f.details.clone()));
            }
            !own
        });
        match received.type_url.as_str() {
            CDS => finish(&mut self.clusters, received, &errors),
            LDS => finish(&mut self.listeners, received, &errors),
            EDS => finish(&mut self.endpoints, received, &errors),
            RDS => finish(&mut self.routes, received, &errors),
            _ => {}
        }
        if self.names_changed || !received.removed.is_empty() {
            self.forget(apply);
        }
        self.advance(now);
        errors
    }

    /// What could not be put in force outside of the answer to its own response (a listener that had to wait for its
    /// routes). Each is told once.
    pub fn take_failures(&mut self) -> Vec<Failure> {
        std::mem::take(&mut self.failures)
    }

    fn receive_clusters(
        &mut self,
        received: &Received,
        now: Instant,
        apply: &mut Apply<'_>,
    ) -> Vec<(String, String)> {
        let mut errors = Vec::new();
        for r in &received.resources {
            let entry = self
                .clusters
                .entries
                .entry(r.name.as_str().into())
                .or_default();
            if entry.fixed {
                // As Envoy: a static cluster is never replaced.
                continue;
            }
            match cluster_version(r) {
                Ok(new) => {
                    // EDS is asked again only on a new stream: endpoints that are held count as its answer.
                    let deadline = cluster_deadline(&new.plan, now);
                    let patience = patience(new.plan.secrets(), now);
                    take(entry, new, deadline, patience);
                }
                Err(state) => {
                    errors.push((r.name.clone(), state.details.clone()));
                    entry.error = Some(Box::new(state));
                }
            }
        }
        let mut gone = Vec::new();
        for name in &received.removed {
            if self
                .clusters
                .entries
                .get(name.as_str())
                .is_some_and(|e| !e.fixed)
                && let Some(entry) = self.clusters.entries.remove(name.as_str())
                && let Some(active) = entry.active
            {
                gone.push(Change::RemoveCluster(active.plan.name.clone()));
            }
        }
        // What is new first, so that a rename does not leave a gap.
        self.settle(now, apply);
        if !gone.is_empty() {
            apply(gone);
        }
        errors
    }

    fn receive_listeners(
        &mut self,
        received: &Received,
        now: Instant,
        apply: &mut Apply<'_>,
    ) -> Vec<(String, String)> {
        let mut errors = Vec::new();
        // Listeners that go first free the addresses that others may take over in the same response.
        let mut gone = Vec::new();
        for name in &received.removed {
            if self
                .listeners
                .entries
                .get(name.as_str())
                .is_some_and(|e| !e.fixed)
                && let Some(entry) = self.listeners.entries.remove(name.as_str())
                && let Some(active) = entry.active
            {
                gone.push(Change::RemoveListener(active.plan.name.clone()));
            }
        }
        if !gone.is_empty() {
            apply(gone);
        }
        for r in &received.resources {
            let entry = self
                .listeners
                .entries
                .entry(r.name.as_str().into())
                .or_default();
            if entry.fixed {
                continue;
            }
            match version::<ListenerMessage, Listener>(r) {
                Ok(new) => {
                    let deadline = listener_deadline(&new.plan, now);
                    let patience = patience(transport::secrets_of_listener(&new.plan), now);
                    take(entry, new, deadline, patience);
                }
                Err(state) => {
                    errors.push((r.name.clone(), state.details.clone()));
                    entry.error = Some(Box::new(state));
                }
            }
        }
        errors
    }

    fn receive_endpoints(
        &mut self,
        received: &Received,
        apply: &mut Apply<'_>,
    ) -> Vec<(String, String)> {
        let planned = received
            .resources
            .iter()
            .map(version::<AssignmentMessage, ClusterLoadAssignment>)
            .collect();
        self.endpoints.receive(
            (EDS, received),
            planned,
            &mut self.absent,
            Change::Endpoints,
            apply,
        )
    }

    fn receive_routes(
        &mut self,
        received: &Received,
        apply: &mut Apply<'_>,
    ) -> Vec<(String, String)> {
        let plan = |r: &ReceivedResource| {
            let new = version::<RouteMessage, RouteConfiguration>(r)?;
            match self.unknown_cluster(&new.plan) {
                Some(details) => Err(refused(r, details)),
                None => Ok(new),
            }
        };
        let planned = received.resources.iter().map(plan).collect();
        self.routes.receive(
            (RDS, received),
            planned,
            &mut self.absent,
            Change::UpsertRoutes,
            apply,
        )
    }

    /// Takes secrets in that came on a stream of their own or from a file, and puts in force what waited for them.
    /// The errors are by name, for the answer.
    pub fn receive_own(
        &mut self,
        received: &Received,
        kind: &ConfigSourceKind,
        now: Instant,
        apply: &mut Apply<'_>,
    ) -> Vec<(String, String)> {
        if received.malformed.is_some() {
            return Vec::new();
        }
        let errors = self.receive_secrets(received, kind, apply);
        self.settle(now, apply);
        self.advance(now);
        errors
    }

    /// There is nobody to ask for a secret: what waits for it waits no longer.
    pub fn nobody_has(
        &mut self,
        kind: &ConfigSourceKind,
        name: &str,
        now: Instant,
        apply: &mut Apply<'_>,
    ) {
        let wanted: Vec<SdsSecret> = self
            .sds_names()
            .iter()
            .filter(|secret| *secret.name == *name)
            .filter(|secret| secret.source.as_ref().is_some_and(|s| s.kind == *kind))
            .cloned()
            .collect();
        self.absent_secrets.extend(wanted);
        self.settle(now, apply);
        self.advance(now);
    }

    fn receive_secrets(
        &mut self,
        received: &Received,
        kind: &ConfigSourceKind,
        apply: &mut Apply<'_>,
    ) -> Vec<(String, String)> {
        let mut errors = Vec::new();
        for r in &received.resources {
            // A name may be wanted with several time limits; it is one secret.
            let wanted: Vec<SdsSecret> = self
                .sds_names()
                .iter()
                .filter(|secret| *secret.name == *r.name)
                .filter(|secret| secret.source.as_ref().is_some_and(|s| s.kind == *kind))
                .cloned()
                .collect();
            let planned = version::<SecretMessage, Secret>(r).and_then(|new| {
                let changes = wanted
                    .iter()
                    .map(|name| Change::Secret(name.clone(), new.plan.clone()))
                    .collect();
                let applied: Result<(), ChangeError> = apply(changes).into_iter().collect();
                applied
                    .map(|()| new)
                    .map_err(|why| refused(r, why.to_string()))
            });
            for name in wanted {
                let entry = self.secrets.entry(name).or_default();
                match &planned {
                    Ok(new) => {
                        entry.error = None;
                        entry.active = Some(new.clone());
                    }
                    Err(state) => entry.error = Some(Box::new(state.clone())),
                }
            }
            if let Err(state) = planned {
                errors.push((r.name.clone(), state.details));
            }
        }
        errors
    }

    /// Secrets to ask for.
    pub fn sds_names(&mut self) -> &BTreeSet<SdsSecret> {
        if std::mem::take(&mut self.wants_stale) {
            self.wanted_secrets = self.needed_secrets();
        }
        &self.wanted_secrets
    }

    /// The secrets that clusters and listeners need, in force or warming.
    pub fn needed_secrets(&self) -> BTreeSet<SdsSecret> {
        let clusters = self.clusters.versions().flat_map(|v| v.plan.secrets());
        let listeners = self
            .listeners
            .versions()
            .flat_map(|v| transport::secrets_of_listener(&v.plan));
        let mut names = BTreeSet::new();
        for secret in clusters.chain(listeners) {
            // Those of the bootstrap are there from the start.
            if secret.source.is_some() && !names.contains(secret) {
                names.insert(secret.clone());
            }
        }
        names
    }

    /// Secrets that nobody needs any more, forgotten with this call.
    pub fn drop_unused_secrets(&mut self) -> Vec<Change> {
        self.sds_names();
        let wanted = &self.wanted_secrets;
        let mut gone = Vec::new();
        self.secrets.retain(|name, entry| {
            let keep = wanted.contains(name);
            if !keep && entry.active.is_some() {
                gone.push(Change::RemoveSecret(name.clone()));
            }
            keep
        });
        self.absent_secrets.retain(|name| wanted.contains(name));
        gone
    }

    /// With `validate_clusters`: a cluster that a route names and that does not exist.
    fn unknown_cluster(&self, routes: &RouteConfiguration) -> Option<String> {
        if !routes.validate_clusters {
            return None;
        }
        let known = |name: &str| self.clusters.entries.contains_key(name);
        routes
            .cluster_names()
            .find(|(_, name)| !known(name))
            .map(|(path, name)| {
                format!("{path}: there is no cluster `{name}` (validate_clusters is on)")
            })
    }

    /// Puts in force whatever waits no longer.
    fn settle(&mut self, now: Instant, apply: &mut Apply<'_>) {
        if !self.unsettled {
            return;
        }
        let mut batch = Vec::new();
        let over = |deadline: Option<Instant>| deadline.is_some_and(|d| d <= now);
        let (endpoints, absent, secrets) = (
            &self.endpoints,
            &self.absent,
            (&self.secrets, &self.absent_secrets),
        );
        for entry in self.clusters.entries.values_mut() {
            let Some(waiting) = &entry.warming else {
                continue;
            };
            let patient = entry.secrets_deadline.filter(|d| *d > now);
            entry.secrets_deadline = patient;
            let ready = over(entry.deadline)
                || eds(&waiting.plan)
                    .is_none_or(|(service, _)| answered(endpoints, absent, EDS, service))
                    && (patient.is_none() || waiting.plan.secrets().all(|s| is_here(secrets, s)));
            if ready {
                batch.push(Change::UpsertCluster(waiting.plan.clone()));
            }
        }
        let routes = &self.routes;
        for entry in self.listeners.entries.values_mut() {
            let patient = entry.secrets_deadline.filter(|d| *d > now);
            entry.secrets_deadline = patient;
            let Some(waiting) = entry.warming.as_ref().filter(|_| self.listeners_begun) else {
                continue;
            };
            let ready = over(entry.deadline)
                || rds(&waiting.plan).all(|(name, _)| answered(routes, absent, RDS, name))
                    && (patient.is_none()
                        || transport::secrets_of_listener(&waiting.plan)
                            .all(|s| is_here(secrets, s)));
            if ready {
                batch.push(Change::UpsertListener(waiting.plan.clone()));
            }
        }
        self.apply_warm(batch, apply);
        self.unsettled = self.clusters.warming() + self.listeners.warming() > 0;
    }

    /// How many clusters and listeners are warming.
    pub fn warming(&self) -> (usize, usize) {
        if self.unsettled {
            (self.clusters.warming(), self.listeners.warming())
        } else {
            (0, 0)
        }
    }

    /// Whether [`Truth::eds_names`] and [`Truth::rds_names`] may have changed since the last call.
    pub fn take_names_changed(&mut self) -> bool {
        std::mem::take(&mut self.names_changed)
    }

    /// Applies a batch of what has warmed; a listener that cannot be opened keeps its former version.
    fn apply_warm(&mut self, batch: Vec<Change>, apply: &mut Apply<'_>) {
        if batch.is_empty() {
            return;
        }
        self.wants_stale = true;
        self.names_changed = true;
        let subjects: Vec<(&'static str, Arc<str>)> = batch
            .iter()
            .filter_map(|change| match change {
                Change::UpsertListener(plan) => Some((LDS, plan.name.clone())),
                Change::UpsertCluster(plan) => Some((CDS, plan.name.clone())),
                _ => None,
            })
            .collect();
        for ((type_url, name), result) in subjects.into_iter().zip(apply(batch)) {
            let why = match type_url {
                LDS => applied(self.listeners.entries.get_mut(&*name), result),
                _ => applied(self.clusters.entries.get_mut(&*name), result),
            };
            if let Some(details) = why {
                self.failures.push(Failure {
                    type_url,
                    name: name.to_string(),
                    details,
                });
            }
        }
    }

    /// Ends the waits whose time is over.
    pub fn tick(&mut self, now: Instant, apply: &mut Apply<'_>) {
        self.settle(now, apply);
        self.advance(now);
    }

    /// When [`Truth::tick`] has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let first = match self.phase {
            Phase::Clusters => self.cds_deadline.filter(|_| !self.clusters.answered),
            Phase::Listeners => self.lds_deadline.filter(|_| !self.listeners.answered),
            Phase::Live => None,
        };
        if !self.unsettled {
            return first;
        }
        self.clusters
            .deadlines()
            .chain(self.listeners.deadlines())
            .chain(first)
            .min()
    }

    /// Moves the start on.
    fn advance(&mut self, now: Instant) {
        let over = |deadline: Option<Instant>| deadline.is_some_and(|d| d <= now);
        if self.phase == Phase::Clusters {
            let answered =
                !self.waits_for_clusters || self.clusters.answered || over(self.cds_deadline);
            if answered && self.warming().0 == 0 {
                self.phase = Phase::Listeners;
                self.lds_deadline = self.lds_timeout.map(|t| now + t);
            }
        }
        if self.phase == Phase::Listeners {
            let answered =
                !self.waits_for_listeners || self.listeners.answered || over(self.lds_deadline);
            if answered && self.warming().1 == 0 {
                self.phase = Phase::Live;
            }
        }
    }

    /// How far the start has come.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Forgets endpoints and routes that nothing refers to; what is asked for follows [`Truth::eds_names`] and
    /// [`Truth::rds_names`].
    fn forget(&mut self, apply: &mut Apply<'_>) {
        let wanted = self.eds_names();
        let mut gone = Vec::new();
        self.endpoints.entries.retain(|name, entry| {
            let keep = wanted.contains(&**name);
            if !keep && entry.active.is_some() {
                gone.push(Change::RemoveEndpoints(name.clone()));
            }
            keep
        });
        if !gone.is_empty() {
            apply(gone);
        }
        let routes = self.rds_names();
        self.absent.retain(|(type_url, name)| match *type_url {
            EDS => wanted.contains(name),
            _ => routes.contains(name),
        });
    }

    /// Routes that no listener needs any more, forgotten with this call.
    pub fn drop_unused_routes(&mut self) -> Vec<Change> {
        let wanted = self.rds_names();
        let mut gone = Vec::new();
        self.routes.entries.retain(|name, entry| {
            let keep = wanted.contains(&**name);
            if !keep && entry.active.is_some() {
                gone.push(Change::RemoveRoutes(name.clone()));
            }
            keep
        });
        gone
    }

    /// Names of endpoints to ask for.
    pub fn eds_names(&self) -> BTreeSet<String> {
        self.clusters
            .versions()
            .filter_map(|v| eds(&v.plan))
            .map(|(name, _)| name.to_owned())
            .collect()
    }

    /// Names of routes to ask for.
    pub fn rds_names(&self) -> BTreeSet<String> {
        self.listeners
            .versions()
            .flat_map(|v| {
                rds(&v.plan)
                    .map(|(name, _)| name.to_owned())
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

fn after(now: Instant, source: &ConfigSource) -> Option<Instant> {
    source.initial_fetch_timeout.map(|t| now + t)
}

/// The service name that a cluster asks EDS for.
fn eds(cluster: &LazyCluster) -> Option<(&str, &ConfigSource)> {
    cluster.eds().map(|(service, source)| (&**service, source))
}

/// The routes that a listener asks RDS for.
fn rds(listener: &Listener) -> impl Iterator<Item = (&str, &ConfigSource)> {
    let chains = listener
        .filter_chains
        .iter()
        .chain(&listener.default_filter_chain);
    chains
        .flat_map(|c| &c.filters)
        .flat_map(|f| match &f.config {
            NetworkFilterConfig::HttpConnectionManager(manager) => manager.routes.rds(),
            _ => Vec::new(),
        })
}

/// When a listener stops waiting: never while one of its routes or secrets has no limit.
fn listener_deadline(listener: &Listener, now: Instant) -> Option<Instant> {
    let secrets = transport::secrets_of_listener(listener).filter_map(|s| s.source.as_ref());
    latest(now, rds(listener).map(|(_, source)| source).chain(secrets))
}

/// When waiting for these secrets ends.
fn patience<'s>(mut secrets: impl Iterator<Item = &'s SdsSecret>, now: Instant) -> Option<Instant> {
    secrets.next().map(|_| now + SECRETS_WAIT)
}

/// When a cluster stops waiting, see [`listener_deadline`].
fn cluster_deadline(cluster: &LazyCluster, now: Instant) -> Option<Instant> {
    let secrets = cluster.secrets().filter_map(|s| s.source.as_ref());
    latest(
        now,
        eds(cluster)
            .map(|(_, source)| source)
            .into_iter()
            .chain(secrets),
    )
}

fn latest<'s>(now: Instant, sources: impl Iterator<Item = &'s ConfigSource>) -> Option<Instant> {
    let mut latest = now;
    for source in sources {
        latest = latest.max(after(now, source)?);
    }
    Some(latest)
}

/// Whether a secret has come; those of the bootstrap are always there.
fn is_here(
    (secrets, absent): (&BTreeMap<SdsSecret, Entry<Secret>>, &BTreeSet<SdsSecret>),
    secret: &SdsSecret,
) -> bool {
    secret.source.is_none()
        || secrets.get(secret).is_some_and(|e| e.active.is_some())
        || absent.contains(secret)
}
