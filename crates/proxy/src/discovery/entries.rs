//! What is known of resources, by name: the version in force, the one that waits, the one that was refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use prost::Message;
use proto::envoy::config::cluster::v3::Cluster as ClusterMessage;
use xds::client::{Received, ReceivedResource};

use super::truth::Apply;
use crate::{
    plan::{Cluster, LazyCluster, PlanErrors},
    server::{Change, ChangeError},
};

/// One version of a resource.
#[derive(Debug, Clone)]
pub struct Version<T> {
    /// What it means.
    pub plan: Arc<T>,
    /// As it came; of a static resource a part of the bootstrap.
    pub resource: Bytes,
    /// The control plane's name for this version; empty for a static resource.
    pub version: Box<str>,
    /// When it came.
    pub updated: SystemTime,
}

/// The last version that was refused.
#[derive(Debug, Clone)]
pub struct ErrorState {
    /// As it came.
    pub resource: Bytes,
    /// Its version.
    pub version: Box<str>,
    /// Why.
    pub details: String,
    /// When.
    pub attempted: SystemTime,
}

/// What is known under one name.
#[derive(Debug, Clone)]
pub struct Entry<T> {
    /// From the bootstrap, and never changed by discovery.
    pub fixed: bool,
    /// In force.
    pub active: Option<Version<T>>,
    // What is rare is boxed: there may be ten thousand entries.
    /// Waiting for what it refers to.
    pub warming: Option<Box<Version<T>>>,
    /// When waiting ends in any case.
    pub(super) deadline: Option<Instant>,
    /// When waiting for secrets ends; `None` once it has.
    pub(super) secrets_deadline: Option<Instant>,
    /// Refused.
    pub error: Option<Box<ErrorState>>,
}

impl<T> Default for Entry<T> {
    fn default() -> Self {
        Self {
            fixed: false,
            active: None,
            warming: None,
            deadline: None,
            secrets_deadline: None,
            error: None,
        }
    }
}

/// Resources of one kind by name.
#[derive(Debug)]
pub struct Config<T> {
    /// By name.
    pub entries: BTreeMap<Arc<str>, Entry<T>>,
    /// Version of the last response that was taken as a whole.
    pub version: String,
    /// Whether a first response was processed.
    pub answered: bool,
}

impl<T> Default for Config<T> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            version: String::new(),
            answered: false,
        }
    }
}

impl<T> Config<T> {
    /// Every version there is, active or warming.
    pub(super) fn versions(&self) -> impl Iterator<Item = &Version<T>> {
        self.entries
            .values()
            .flat_map(|e| e.active.iter().chain(e.warming.as_deref()))
    }

    /// How many are warming.
    pub fn warming(&self) -> usize {
        self.entries
            .values()
            .filter(|e| e.warming.is_some())
            .count()
    }

    /// Takes resources in that others refer to by name (EDS, RDS): what is sound is in force at once.
    pub(super) fn receive(
        &mut self,
        (type_url, received): (&'static str, &Received),
        planned: Vec<Result<Version<T>, ErrorState>>,
        absent: &mut BTreeSet<(&'static str, String)>,
        change: impl Fn(Arc<T>) -> Change,
        apply: &mut Apply<'_>,
    ) -> Vec<(String, String)>
    where
        T: PartialEq,
    {
        let mut errors = Vec::new();
        let mut batch = Vec::new();
        for (r, planned) in received.resources.iter().zip(planned) {
            absent.remove(&(type_url, r.name.clone()));
            let entry = self.entries.entry(r.name.as_str().into()).or_default();
            match planned {
                Ok(new) => {
                    if entry.active.as_ref().is_none_or(|old| old.plan != new.plan) {
                        batch.push(change(new.plan.clone()));
                    }
                    entry.error = None;
                    entry.active = Some(new);
                }
                Err(state) => {
                    errors.push((r.name.clone(), state.details.clone()));
                    entry.error = Some(Box::new(state));
                }
            }
        }
        // What does not exist (yet) is an answer as well: nobody waits for it any longer.
        absent.extend(received.removed.iter().map(|name| (type_url, name.clone())));
        if !batch.is_empty() {
            apply(batch);
        }
        errors
    }

    pub(super) fn deadlines(&self) -> impl Iterator<Item = Instant> {
        self.entries
            .values()
            .filter(|e| e.warming.is_some())
            .flat_map(|e| e.deadline.into_iter().chain(e.secrets_deadline))
    }
}

/// A new version waits; the same plan again only gets the new version's name.
pub(super) fn take<T: PartialEq>(
    entry: &mut Entry<T>,
    new: Version<T>,
    deadline: Option<Instant>,
    secrets_deadline: Option<Instant>,
) {
    entry.error = None;
    if let Some(active) = &mut entry.active
        && active.plan == new.plan
    {
        // Bytes may differ where the meaning does not (accepted without effect): the dump shows the latest.
        entry.warming = None;
        let plan = active.plan.clone();
        let resource = match active.resource == new.resource {
            true => active.resource.clone(),
            false => new.resource,
        };
        *active = Version {
            plan,
            resource,
            ..new
        };
        return;
    }
    entry.warming = Some(Box::new(new));
    entry.deadline = deadline;
    entry.secrets_deadline = secrets_deadline;
}

/// How long a version waits for its secrets. One certificate that is not there must not keep a whole listener, or the
/// proxy, from serving: its chain refuses until the certificate comes. (Envoy waits as long as the configuration says,
/// which may be for ever.)
pub(super) const SECRETS_WAIT: Duration = Duration::from_secs(2);

pub(super) fn finish<T>(config: &mut Config<T>, received: &Received, errors: &[(String, String)]) {
    config.answered = true;
    if errors.is_empty() && received.refused.is_empty() {
        config.version.clone_from(&received.version);
    }
}

/// Whether waiting for a name is over. As in Envoy a refused answer ends it, too: without a limit of time a mistake in one
/// route would keep its listener, and the start, waiting for ever.
pub(super) fn answered<T>(
    config: &Config<T>,
    absent: &BTreeSet<(&'static str, String)>,
    type_url: &'static str,
    name: &str,
) -> bool {
    config
        .entries
        .get(name)
        .is_some_and(|e| e.active.is_some() || e.error.is_some())
        || absent.contains(&(type_url, name.to_owned()))
}

/// Decodes and plans one resource.
pub(super) fn version<M, P>(r: &ReceivedResource) -> Result<Version<P>, ErrorState>
where
    M: Message + Default,
    P: for<'m> TryFrom<&'m M, Error = PlanErrors>,
{
    let message = M::decode(r.resource.value.as_slice())
        .map_err(|e| refused(r, format!("is not a {}: {e}", r.resource.type_url)))?;
    let plan = P::try_from(&message).map_err(|e| refused(r, e.to_string()))?;
    Ok(Version {
        plan: Arc::new(plan),
        resource: Bytes::copy_from_slice(&r.resource.value),
        version: r.version.as_str().into(),
        updated: SystemTime::now(),
    })
}

/// The same for a cluster, which keeps its encoding in place of its plan.
pub(super) fn cluster_version(r: &ReceivedResource) -> Result<Version<LazyCluster>, ErrorState> {
    let version = version::<ClusterMessage, Cluster>(r)?;
    // Nobody else has it yet.
    let plan = Arc::unwrap_or_clone(version.plan);
    Ok(Version {
        plan: Arc::new(LazyCluster::later(plan, version.resource.clone())),
        resource: version.resource,
        version: version.version,
        updated: version.updated,
    })
}

pub(super) fn refused(r: &ReceivedResource, details: String) -> ErrorState {
    ErrorState {
        resource: Bytes::copy_from_slice(&r.resource.value),
        version: r.version.as_str().into(),
        details,
        attempted: SystemTime::now(),
    }
}

/// The outcome of a change: the version is in force, or refused (and the former one stays).
pub(super) fn applied<T>(
    entry: Option<&mut Entry<T>>,
    result: Result<(), ChangeError>,
) -> Option<String> {
    let entry = entry?;
    let version = entry.warming.take()?;
    match result {
        Ok(()) => {
            entry.error = None;
            entry.active = Some(*version);
            None
        }
        Err(why) => {
            entry.error = Some(Box::new(late(*version, why.to_string())));
            Some(why.to_string())
        }
    }
}

fn late<T>(version: Version<T>, details: String) -> ErrorState {
    ErrorState {
        resource: version.resource,
        version: version.version,
        details,
        attempted: SystemTime::now(),
    }
}
