//! The state of one ADS stream: what the client watches, what it holds, what it has acknowledged.
//!
//! A stream remembers what it sent as the very [`ResourceSet`] that it was handed, so that a proxy costs a pointer
//! a type where all proxies of a view hold the same. The invariant: of the names that the client watches it
//! holds exactly what [`Watch::sent`] has of them, unless the name is in [`Watch::forced`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Names, Request, Response};
use crate::{
    Mode, Resource, ResourceSet,
    resource::version_text,
    type_url::{CDS, ECDS, EDS, is_wildcard},
};

/// One client's stream.
#[derive(Debug)]
pub struct Stream {
    mode: Mode,
    watches: BTreeMap<Arc<str>, Watch>,
    next_nonce: u64,
}

/// What a request means for the one who serves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The client took the response with this nonce.
    Ack {
        /// The type that was answered.
        type_url: Arc<str>,
        /// The response that was answered.
        nonce: String,
    },
    /// Nothing to do: a stale answer, or names that are no longer wanted.
    Ignored,
    /// The client rejected the response with this nonce and keeps what it had.
    Nack {
        /// The type that was answered.
        type_url: Arc<str>,
        /// The response that was answered.
        nonce: String,
        /// Its reason.
        message: String,
    },
    /// Something new is asked for: call [`Stream::update`] for this type.
    Respond {
        /// The type that is asked for.
        type_url: Arc<str>,
        /// Whether this is the stream's first request for the type.
        first: bool,
    },
}

/// Which half of a change [`Stream::update`] sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Upserts and removals in one response.
    All,
    /// Only what is gone; comes last in a push, in reverse order of types.
    Removals,
    /// Only what is new or changed.
    Upserts,
}

/// How far the client is with one type, as `/debug/syncz` tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeStatus {
    /// The type.
    pub type_url: Arc<str>,
    /// Nonce of the last response; empty when there was none.
    pub sent: String,
    /// Nonce of the last response that was accepted.
    pub acked: String,
    /// Nonce and reason of the last rejection, until a later response is accepted.
    pub rejected: Option<(String, String)>,
    /// Number of names watched; 0 for a wildcard.
    pub names: usize,
}

#[derive(Debug)]
struct Watch {
    wildcard: bool,
    names: BTreeSet<Arc<str>>,
    sent: Arc<ResourceSet>,
    /// Watched names that must be sent again although nothing changed.
    forced: Forced,
    /// What a delta client says it holds from an earlier stream, until the first answer.
    held: BTreeMap<String, String>,
    sent_nonce: String,
    acked_nonce: String,
    rejected: Option<(String, String)>,
}

#[derive(Debug)]
enum Forced {
    All,
    Names(BTreeSet<Arc<str>>),
}

impl Stream {
    /// A stream on which nothing was asked yet.
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            watches: BTreeMap::new(),
            next_nonce: 0,
        }
    }

    /// The form of protocol that it speaks.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Takes a request in and says what it means.
    pub fn request(&mut self, request: &Request) -> Event {
        let key: Arc<str> = match self.watches.get_key_value(request.type_url.as_str()) {
            Some((key, _)) => key.clone(),
            None => request.type_url.as_str().into(),
        };
        match &request.names {
            Names::Sotw(names) => self.sotw(&key, request, names),
            Names::Delta {
                subscribe,
                unsubscribe,
                initial,
            } => self.delta(&key, request, subscribe, unsubscribe, initial),
        }
    }

    fn sotw(&mut self, key: &Arc<str>, request: &Request, names: &[String]) -> Event {
        if let Some(event) = self.rejection(key, request) {
            return event;
        }
        let wildcard = names.iter().any(|n| n == "*") || (names.is_empty() && is_wildcard(key));
        let wanted: BTreeSet<Arc<str>> = names
            .iter()
            .filter(|n| *n != "*")
            .map(|n| n.as_str().into())
            .collect();
        let known = self
            .watches
            .get_mut(key)
            .filter(|_| !request.nonce.is_empty());
        let Some(watch) = known else {
            if names.is_empty() && !wildcard {
                self.watches.remove(key);
                return Event::Ignored;
            }
            let watch = Watch::new(wildcard, wanted, Forced::All);
            let first = self.watches.insert(key.clone(), watch).is_none();
            return Event::Respond {
                type_url: key.clone(),
                first,
            };
        };
        if request.nonce != watch.sent_nonce {
            return Event::Ignored;
        }
        watch.accept(&request.nonce);
        if names.is_empty() && !wildcard {
            // The client has lost interest in the type; it holds nothing of it any more.
            self.watches.remove(key);
            return Event::Ack {
                type_url: key.clone(),
                nonce: request.nonce.clone(),
            };
        }
        let added: Vec<_> = wanted.difference(&watch.names).cloned().collect();
        let widened = wildcard && !watch.wildcard;
        watch.wildcard = wildcard;
        watch.names = wanted;
        if added.is_empty() && !widened {
            return Event::Ack {
                type_url: key.clone(),
                nonce: request.nonce.clone(),
            };
        }
        watch.force(added);
        Event::Respond {
            type_url: key.clone(),
            first: false,
        }
    }

    fn delta(
        &mut self,
        key: &Arc<str>,
        request: &Request,
        subscribe: &[String],
        unsubscribe: &[String],
        initial: &[(String, String)],
    ) -> Event {
        let names = |list: &[String]| -> BTreeSet<Arc<str>> {
            list.iter()
                .filter(|n| *n != "*")
                .map(|n| n.as_str().into())
                .collect()
        };
        let star = |list: &[String]| list.iter().any(|n| n == "*");
        let Some(watch) = self.watches.get_mut(key) else {
            let wildcard = star(subscribe) || (subscribe.is_empty() && is_wildcard(key));
            let mut watch = Watch::new(wildcard, names(subscribe), Forced::All);
            if !wildcard {
                watch
                    .names
                    .extend(initial.iter().map(|(n, _)| Arc::from(n.as_str())));
            }
            for gone in unsubscribe {
                watch.names.remove(gone.as_str());
            }
            watch.held = initial.iter().cloned().collect();
            self.watches.insert(key.clone(), watch);
            return Event::Respond {
                type_url: key.clone(),
                first: true,
            };
        };
        // A subscription may ride on an answer, even on a stale or a rejecting one: it counts in any case.
        let added = names(subscribe);
        let widened = star(subscribe) && !watch.wildcard;
        watch.wildcard = (watch.wildcard || star(subscribe)) && !star(unsubscribe);
        for gone in unsubscribe {
            watch.names.remove(gone.as_str());
        }
        watch.names.extend(added.iter().cloned());
        watch.force(added.iter().cloned());
        if let Some(event) = self.rejection(key, request) {
            return event;
        }
        let watch = self.watches.get_mut(key).expect("it was found above");
        let current = !request.nonce.is_empty() && request.nonce == watch.sent_nonce;
        if current {
            watch.accept(&request.nonce);
        }
        if widened {
            watch.forced = Forced::All;
        }
        if widened || !added.is_empty() {
            return Event::Respond {
                type_url: key.clone(),
                first: false,
            };
        }
        if current {
            return Event::Ack {
                type_url: key.clone(),
                nonce: request.nonce.clone(),
            };
        }
        Event::Ignored
    }

    fn rejection(&mut self, key: &Arc<str>, request: &Request) -> Option<Event> {
        let message = request.error.clone()?;
        if let Some(watch) = self.watches.get_mut(key)
            && watch.sent_nonce == request.nonce
        {
            watch.rejected = Some((request.nonce.clone(), message.clone()));
        }
        Some(Event::Nack {
            type_url: key.clone(),
            nonce: request.nonce.clone(),
            message,
        })
    }

    /// The types that the client watches, in no particular order of pushing.
    pub fn watched(&self) -> impl Iterator<Item = &Arc<str>> {
        self.watches.keys()
    }

    /// Whether the client watches this type.
    pub fn watches(&self, type_url: &str) -> bool {
        self.watches.contains_key(type_url)
    }

    /// Whether the client watches everything of this type.
    pub fn is_wildcard(&self, type_url: &str) -> bool {
        self.watches.get(type_url).is_some_and(|w| w.wildcard)
    }

    /// The names of this type that the client asks for one by one.
    pub fn names(&self, type_url: &str) -> impl Iterator<Item = &Arc<str>> {
        self.watches
            .get(type_url)
            .into_iter()
            .flat_map(|w| w.names.iter())
    }

    /// What the client holds, as far as was sent (names that it does not watch aside).
    pub fn sent(&self, type_url: &str) -> Option<&Arc<ResourceSet>> {
        self.watches.get(type_url).map(|w| &w.sent)
    }

    /// How far the client is, type by type.
    pub fn status(&self) -> Vec<TypeStatus> {
        self.watches
            .iter()
            .map(|(type_url, w)| TypeStatus {
                type_url: type_url.clone(),
                sent: w.sent_nonce.clone(),
                acked: w.acked_nonce.clone(),
                rejected: w.rejected.clone(),
                names: w.names.len(),
            })
            .collect()
    }

    /// Brings the client from what it holds to `current`; `None` when it has all of it already, or does not watch
    /// the type. `version` is the name of the push, shown as the response's version.
    ///
    /// A response with clusters makes the endpoints of these clusters due again, even unchanged ones: Envoy needs
    /// an answer of EDS to finish warming a changed cluster.
    pub fn update(
        &mut self,
        type_url: &str,
        current: &Arc<ResourceSet>,
        version: &str,
        phase: Phase,
    ) -> Option<Response> {
        let (key, _) = self.watches.get_key_value(type_url)?;
        let key = key.clone();
        let watch = self.watches.get_mut(&key).expect("its key was found");
        let first = watch.sent_nonce.is_empty();
        let mut upserts = Vec::new();
        let mut missing = Vec::new();
        if phase != Phase::Removals {
            (upserts, missing) = watch.due(&key, current);
        }
        let gone = watch.gone(&key, current);
        let keep_gone = phase == Phase::Upserts && !gone.is_empty();
        let mut removed = if phase == Phase::Upserts {
            Vec::new()
        } else {
            gone
        };

        if upserts.is_empty() && removed.is_empty() && missing.is_empty() && !first {
            if !keep_gone {
                watch.sent = current.clone();
            }
            return None;
        }
        if first && phase == Phase::Removals {
            return None;
        }
        // State of the world: a type that is wanted whole is sent whole.
        let mut listed = upserts.clone();
        if self.mode == Mode::Sotw && (watch.wildcard || is_wildcard(&key)) {
            listed = current
                .iter()
                .filter(|r| watch.wants(r.name()))
                .cloned()
                .collect();
            if keep_gone {
                listed.extend(
                    watch
                        .sent
                        .iter()
                        .filter(|r| watch.wants(r.name()) && current.find(r.name()).is_none())
                        .cloned(),
                );
            }
        }
        watch.sent = if keep_gone {
            let old = watch
                .sent
                .iter()
                .filter(|r| current.find(r.name()).is_none());
            Arc::new(current.iter().chain(old).cloned().collect())
        } else {
            current.clone()
        };
        removed.extend(missing);
        if self.mode == Mode::Sotw && listed.is_empty() && !watch.wildcard && !is_wildcard(&key) {
            // The state-of-the-world form has no word for "does not exist"; silence is its answer.
            if !first {
                return None;
            }
        }
        self.next_nonce += 1;
        let nonce = format!("{version}-{}", self.next_nonce);
        watch.sent_nonce.clone_from(&nonce);
        let response = Response::new(self.mode, &key, version, nonce, &listed, &removed);
        if &*key == CDS
            && let Some(endpoints) = self.watches.get_mut(EDS)
        {
            let due: Vec<_> = upserts
                .iter()
                .filter_map(|r| endpoints.names.get(&**r.name()))
                .cloned()
                .collect();
            endpoints.force(due);
        }
        Some(response)
    }
}

impl Watch {
    fn new(wildcard: bool, names: BTreeSet<Arc<str>>, forced: Forced) -> Self {
        Self {
            wildcard,
            names,
            sent: Arc::default(),
            forced,
            held: BTreeMap::new(),
            sent_nonce: String::new(),
            acked_nonce: String::new(),
            rejected: None,
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    fn accept(&mut self, nonce: &str) {
        nonce.clone_into(&mut self.acked_nonce);
        self.rejected = None;
    }

    fn force(&mut self, names: impl IntoIterator<Item = Arc<str>>) {
        if let Forced::Names(forced) = &mut self.forced {
            forced.extend(names);
        }
    }

    /// What must be sent, and which names asked for do not exist (EDS: those get an empty assignment instead,
    /// since a cluster would wait for its endpoints for ever).
    fn due(
        &mut self,
        type_url: &str,
        current: &Arc<ResourceSet>,
    ) -> (Vec<Arc<Resource>>, Vec<Arc<str>>) {
        let forced = std::mem::replace(&mut self.forced, Forced::Names(BTreeSet::new()));
        let held = std::mem::take(&mut self.held);
        let is_forced = |name: &str| match &forced {
            Forced::All => held.is_empty() || !held.contains_key(name),
            Forced::Names(names) => names.contains(name),
        };
        if Arc::ptr_eq(&self.sent, current) && matches!(&forced, Forced::Names(n) if n.is_empty()) {
            return (Vec::new(), Vec::new());
        }
        let mut upserts = Vec::new();
        let mut before = self.sent.iter().peekable();
        for resource in current.iter() {
            let name = resource.name();
            while before.peek().is_some_and(|r| r.name() < name) {
                before.next();
            }
            let same_as_sent = before
                .peek()
                .is_some_and(|r| r.name() == name && r.version() == resource.version());
            let same = same_as_sent
                || held
                    .get(&**name)
                    .is_some_and(|v| *v == version_text(resource.version()));
            if (!same || is_forced(name)) && self.wants(name) {
                upserts.push(resource.clone());
            }
        }
        // Watched names are kept as the strings of the shared resources, not as copies of each client.
        let asked: Vec<Arc<str>> = match &forced {
            Forced::All => self.names.iter().cloned().collect(),
            Forced::Names(names) => names.iter().cloned().collect(),
        };
        let mut missing = Vec::new();
        for name in asked {
            match current.find(&name) {
                Some(r) if !Arc::ptr_eq(r.name(), &name) && self.names.remove(&*name) => {
                    self.names.insert(r.name().clone());
                }
                Some(_) => {}
                None if !self.names.contains(&*name) => {}
                None if type_url == EDS => upserts.push(Arc::new(empty_assignment(&name))),
                None => missing.push(name),
            }
        }
        // Held from an earlier stream, and no longer there.
        missing.extend(
            held.keys()
                .filter(|n| current.find(n).is_none() && type_url != EDS)
                .map(|n| Arc::from(n.as_str())),
        );
        missing.sort_unstable();
        missing.dedup();
        (upserts, missing)
    }

    /// What the client holds and `current` does not. EDS and ECDS know no removal: the cluster or filter goes, and
    /// with it the subscription.
    fn gone(&self, type_url: &str, current: &Arc<ResourceSet>) -> Vec<Arc<str>> {
        if matches!(type_url, EDS | ECDS) || Arc::ptr_eq(&self.sent, current) {
            return Vec::new();
        }
        self.sent
            .iter()
            .filter(|r| self.wants(r.name()) && current.find(r.name()).is_none())
            .map(|r| r.name().clone())
            .collect()
    }
}

/// A `ClusterLoadAssignment` that has a name (field 1) and no endpoints.
fn empty_assignment(name: &Arc<str>) -> Resource {
    let mut value = bytes::BytesMut::new();
    crate::resource::put_field(&mut value, 1, name.as_bytes());
    Resource::new(name.clone(), EDS, &value)
}

#[cfg(test)]
mod tests;
