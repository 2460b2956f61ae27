//! What proxies of one view hold, built once for all of them.
//!
//! Two proxies are of one view when translation gives them the same shared resources ([`Proxy::view_key`]). A view is
//! brought up to date by the first proxy that asks after a change; what came out as before stays the same in memory, so
//! that "has this proxy all of it?" is mostly a comparison of pointers.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::{BuildHasher, Hash, Hasher},
    sync::Arc,
    time::Instant,
};

use foldhash::fast::FixedState;
use parking_lot::Mutex;
use xds::{Resource, ResourceSet, type_url::EDS};

use super::{Change, Interner, change::Part};
use crate::{
    grpc,
    model::{self, Mesh, Proxy},
    names::parse_cluster,
    translate::Translate,
};

/// A state of the mesh as it is pushed.
#[derive(Debug, Clone)]
pub struct Push {
    /// Counts pushes from 1.
    pub generation: u64,
    /// istiod's form: time of the push and its number.
    pub version: String,
    /// The mesh.
    pub mesh: Arc<Mesh>,
    /// When the first change of this push came in.
    pub since: Instant,
    /// The last changes, each with the generation that it led to; oldest first.
    history: VecDeque<(u64, Arc<Change>)>,
}

impl Push {
    /// The first state.
    pub fn first(mesh: Arc<Mesh>, version: String) -> Self {
        Push {
            generation: 1,
            version,
            mesh,
            since: Instant::now(),
            history: VecDeque::new(),
        }
    }

    /// The state after a change.
    pub fn next(
        &self,
        mesh: Arc<Mesh>,
        version: String,
        change: Arc<Change>,
        since: Instant,
    ) -> Self {
        let mut history = self.history.clone();
        let generation = self.generation + 1;
        history.push_back((generation, change));
        if history.len() > HISTORY {
            history.pop_front();
        }
        Push {
            generation,
            version,
            mesh,
            since,
            history,
        }
    }

    /// Whether a proxy that was placed in the mesh of `generation` has the same place now.
    pub(crate) fn same_place_since(&self, generation: u64) -> bool {
        self.history
            .front()
            .is_some_and(|(first, _)| *first <= generation + 1)
            && self
                .history
                .iter()
                .filter(|(g, _)| *g > generation)
                .all(|(_, c)| c.leaves_proxies_in_place())
    }

    /// Whether something of a type may differ from what was built at `generation`, and how.
    fn changes_since(&self, generation: u64, type_url: &str, part: Part, router: bool) -> Since {
        if generation >= self.generation {
            return Since::Nothing;
        }
        // A generation that history no longer reaches back to: anything may have happened.
        if self
            .history
            .front()
            .is_none_or(|(first, _)| *first > generation + 1)
        {
            return Since::Anything;
        }
        let mut endpoints = Vec::new();
        for (_, change) in self.history.iter().filter(|(g, _)| *g > generation) {
            if !change.affects(type_url, part, router) {
                continue;
            }
            if type_url == EDS && change.only_endpoints() {
                endpoints.push(change.clone());
            } else {
                return Since::Anything;
            }
        }
        if endpoints.is_empty() {
            Since::Nothing
        } else {
            Since::Endpoints(endpoints)
        }
    }
}

enum Since {
    Nothing,
    Endpoints(Vec<Arc<Change>>),
    Anything,
}

/// What resources are made with and kept in.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    /// The state of the mesh.
    pub push: &'a Push,
    /// The translation.
    pub translate: &'a dyn Translate,
    /// Where resources are shared across views.
    pub interner: &'a Interner,
}

impl std::fmt::Debug for Scope<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scope")
            .field("generation", &self.push.generation)
            .finish_non_exhaustive()
    }
}

impl Scope<'_> {
    /// Encoded resources, sorted by name; what equals one of `before` is that one.
    fn seal(&self, made: Vec<model::Resource>, before: &[Arc<Resource>]) -> Vec<Arc<Resource>> {
        let mut out: Vec<Arc<Resource>> = made
            .into_iter()
            .map(|r| {
                let old = before
                    .binary_search_by(|b| (**b.name()).cmp(&r.name))
                    .ok()
                    .map(|i| &before[i]);
                self.one(r, old)
            })
            .collect();
        out.sort_by(|a, b| a.name().cmp(b.name()));
        out
    }

    fn one(&self, made: model::Resource, before: Option<&Arc<Resource>>) -> Arc<Resource> {
        match before {
            Some(old) if old.value() == made.value => old.clone(),
            _ => self
                .interner
                .intern(Resource::new(made.name, &made.type_url, &made.value)),
        }
    }
}

/// All views in use.
#[derive(Debug, Default)]
pub struct Views(Mutex<HashMap<u64, Arc<View>>>);

impl Views {
    /// The view of a proxy. All of a gateway's routes and listeners hang on the ports of its own workload, and so do
    /// those that a gRPC server asks for.
    pub fn of(&self, mesh: &Mesh, proxy: &Proxy, inbound_key: u64) -> Arc<View> {
        let key = if proxy.is_router() || grpc::is_grpc(&proxy.node) {
            inbound_key
        } else {
            proxy.view_key(mesh)
        };
        let mut views = self.0.lock();
        views
            .entry(key)
            .or_insert_with(|| Arc::new(View::new(key, proxy.is_router())))
            .clone()
    }

    /// Forgets views that no proxy has.
    pub fn sweep(&self) {
        self.0.lock().retain(|_, view| Arc::strong_count(view) > 1);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The shared resources of one view.
#[derive(Debug)]
pub struct View {
    /// The proxies' common key.
    pub key: u64,
    router: bool,
    whole: Mutex<HashMap<Arc<str>, Arc<Mutex<Whole>>>>,
    named: Mutex<HashMap<Arc<str>, Arc<Mutex<Named>>>>,
}

#[derive(Debug, Default)]
struct Whole {
    generation: u64,
    shared: Arc<Listed>,
}

/// The shared resources of a type that is wanted whole.
#[derive(Debug, Default, PartialEq)]
pub struct Listed {
    /// Sorted by name.
    resources: Vec<Arc<Resource>>,
    /// Those that lead to one pod, by its address: that pod does not get them.
    of_pods: HashMap<String, HashSet<String>>,
}

#[derive(Debug, Default)]
struct Named {
    generation: u64,
    /// By name, those that do not exist included.
    known: HashMap<Arc<str>, Option<Arc<Resource>>>,
    /// What was known before the last change, to share what stayed.
    before: HashMap<Arc<str>, Arc<Resource>>,
    /// By hash of the names asked for.
    sets: HashMap<u64, (u64, Arc<ResourceSet>)>,
}

impl View {
    fn new(key: u64, router: bool) -> Self {
        View {
            key,
            router,
            whole: Mutex::default(),
            named: Mutex::default(),
        }
    }

    /// The shared resources of a type that is wanted whole.
    pub fn whole(&self, scope: Scope<'_>, type_url: &Arc<str>, proxy: &Proxy) -> Arc<Listed> {
        let cell = self
            .whole
            .lock()
            .entry(type_url.clone())
            .or_default()
            .clone();
        // Held while building: the other proxies of the view wait for the result instead of building it as well.
        let mut whole = cell.lock();
        let push = scope.push;
        let stale = whole.generation == 0
            || !matches!(
                push.changes_since(whole.generation, type_url, Part::Shared, self.router),
                Since::Nothing
            );
        if stale {
            let made = scope.translate.shared(type_url, &push.mesh, proxy);
            let mut of_pods: HashMap<String, HashSet<String>> = HashMap::new();
            for s in &made {
                if let Some(pod) = &s.of_pod {
                    of_pods
                        .entry(pod.clone())
                        .or_default()
                        .insert(s.resource.name.clone());
                }
            }
            let made = made.into_iter().map(|s| s.resource).collect();
            let resources = scope.seal(made, &whole.shared.resources);
            if !same(&resources, &whole.shared.resources) || of_pods != whole.shared.of_pods {
                whole.shared = Arc::new(Listed { resources, of_pods });
            }
        }
        whole.generation = whole.generation.max(push.generation);
        whole.shared.clone()
    }

    /// The resources of these names. `key` is [`names_key`] of them.
    pub fn named<'a>(
        &self,
        scope: Scope<'_>,
        type_url: &Arc<str>,
        proxy: &Proxy,
        key: u64,
        names: impl Iterator<Item = &'a Arc<str>>,
    ) -> Arc<ResourceSet> {
        let cell = self
            .named
            .lock()
            .entry(type_url.clone())
            .or_default()
            .clone();
        let mut named = cell.lock();
        named.catch_up(scope.push, type_url, self.router);
        let generation = named.generation;
        if let Some((built, set)) = named.sets.get(&key)
            && *built == generation
        {
            return set.clone();
        }
        let names: Vec<&Arc<str>> = names.collect();
        if generation > scope.push.generation {
            // Another proxy has seen a newer mesh already, and a push for this one is on its way: nothing made from the
            // older mesh may stay.
            let all: Vec<&str> = names.iter().map(|n| &***n).collect();
            let made = scope
                .translate
                .named(type_url, &scope.push.mesh, proxy, &all);
            return Arc::new(ResourceSet::new(scope.seal(made, &[])));
        }
        let missing: Vec<&str> = names
            .iter()
            .filter(|n| !named.known.contains_key(**n))
            .map(|n| &***n)
            .collect();
        if !missing.is_empty() {
            let made = scope
                .translate
                .named(type_url, &scope.push.mesh, proxy, &missing);
            for r in made {
                let before = named.before.remove(r.name.as_str());
                let sealed = scope.one(r, before.as_ref());
                named.known.insert(sealed.name().clone(), Some(sealed));
            }
            for name in names
                .iter()
                .filter(|n| !named.known.contains_key(**n))
                .collect::<Vec<_>>()
            {
                named.known.insert((*name).clone(), None);
            }
        }
        let mut found: Vec<Arc<Resource>> = names
            .iter()
            .filter_map(|n| named.known.get(*n).cloned().flatten())
            .collect();
        found.sort_by(|a, b| a.name().cmp(b.name()));
        let set = match named.sets.get(&key) {
            Some((_, old))
                if old.len() == found.len()
                    && old.iter().zip(&found).all(|(a, b)| Arc::ptr_eq(a, b)) =>
            {
                old.clone()
            }
            _ => Arc::new(ResourceSet::new(found)),
        };
        if named.sets.len() >= SETS {
            named.sets.clear();
        }
        named.sets.insert(key, (generation, set.clone()));
        set
    }
}

impl Named {
    fn catch_up(&mut self, push: &Push, type_url: &str, router: bool) {
        match push.changes_since(self.generation, type_url, Part::Shared, router) {
            Since::Nothing => {
                // Sets stay valid: only their label moves on.
                if push.generation > self.generation {
                    for (built, _) in self
                        .sets
                        .values_mut()
                        .filter(|(built, _)| *built == self.generation)
                    {
                        *built = push.generation;
                    }
                }
            }
            Since::Endpoints(changes) => {
                let hit = |name: &str| {
                    let Some(cluster) = parse_cluster(name) else {
                        return true;
                    };
                    changes
                        .iter()
                        .any(|c| c.endpoints.iter().any(|(host, _)| host == cluster.host))
                };
                let stale: Vec<Arc<str>> = self.known.keys().filter(|n| hit(n)).cloned().collect();
                for name in stale {
                    if let Some(Some(old)) = self.known.remove(&name) {
                        self.before.insert(name, old);
                    }
                }
            }
            Since::Anything => {
                self.before = self
                    .known
                    .drain()
                    .filter_map(|(name, r)| Some((name, r?)))
                    .collect();
            }
        }
        self.generation = self.generation.max(push.generation);
    }
}

/// The resources that are one proxy's alone, and the whole sets that they make with the shared ones.
#[derive(Debug, Default)]
pub struct Own(HashMap<Arc<str>, OwnType>);

#[derive(Debug)]
struct OwnType {
    generation: u64,
    key: u64,
    own: Vec<Arc<Resource>>,
    shared: Arc<Listed>,
    set: Arc<ResourceSet>,
}

impl Own {
    /// All resources of a type that is wanted whole. The set is the same in memory as long as it is the same. `key` is
    /// the proxy's [`Proxy::inbound_key`]: its labels, addresses and service ports may change without any object of a
    /// kind that says so.
    pub fn whole(
        &mut self,
        scope: Scope<'_>,
        type_url: &Arc<str>,
        view: &View,
        proxy: &Proxy,
        key: u64,
    ) -> Arc<ResourceSet> {
        let shared = view.whole(scope, type_url, proxy);
        let push = scope.push;
        let old = self.0.get(type_url);
        let fresh = old.filter(|o| {
            o.key == key
                && matches!(
                    push.changes_since(o.generation, type_url, Part::Own, proxy.is_router()),
                    Since::Nothing
                )
        });
        let own = match fresh {
            Some(o) => o.own.clone(),
            None => {
                let made = scope.translate.own(type_url, &push.mesh, proxy);
                scope.seal(made, old.map_or(&[], |o| &o.own))
            }
        };
        let set = match old {
            Some(o) if Arc::ptr_eq(&o.shared, &shared) && same(&o.own, &own) => o.set.clone(),
            _ => {
                let own_address = proxy.node.addresses.first().map(ToString::to_string);
                let left_out = own_address.and_then(|a| shared.of_pods.get(&a));
                let others = shared
                    .resources
                    .iter()
                    .filter(|r| left_out.is_none_or(|names| !names.contains(&**r.name())));
                Arc::new(ResourceSet::new(
                    own.iter().chain(others).cloned().collect(),
                ))
            }
        };
        let state = OwnType {
            generation: push.generation,
            key,
            own,
            shared,
            set: set.clone(),
        };
        self.0.insert(type_url.clone(), state);
        set
    }
}

fn same(a: &[Arc<Resource>], b: &[Arc<Resource>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

/// A hash of the names that a client asks for, in their order.
pub(crate) fn names_key<'a>(names: impl Iterator<Item = &'a Arc<str>>) -> u64 {
    let mut hasher = FixedState::default().build_hasher();
    for name in names {
        name.hash(&mut hasher);
    }
    hasher.finish()
}

/// How many pushes a view may sleep through and still know what it missed.
const HISTORY: usize = 64;
/// Different name lists that one view remembers: proxies in a warm-up ask for many.
const SETS: usize = 256;
