//! One proxy's stream: who it is, what it holds, and how it is brought to the current state.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime},
};

use base::spiffe::Identity;
use parking_lot::Mutex;
use tokio::sync::Notify;
use xds::{
    Mode, ResourceSet,
    server::{Event, Phase, Request, Response, Stream},
    type_url::{CDS, EDS, LDS, NDS, PUSH_ORDER, RDS, SDS},
};

use super::{Rejection, Server, rejection};
use crate::{
    grpc,
    metrics::type_label,
    model::{Node, Proxy},
    push::{Own, Push, View, names_key},
    secret,
};

/// An open stream.
#[derive(Debug)]
pub struct Connection {
    /// Counts streams.
    pub number: u64,
    /// `PROXY-NUMBER`.
    pub id: String,
    /// Who asks.
    pub node: Arc<Node>,
    /// Where from.
    pub peer: String,
    /// Who it has proven to be; secrets are given to nobody else.
    pub caller: Option<Identity>,
    /// Since when.
    pub connected: SystemTime,
    /// Which form of the protocol.
    pub mode: Mode,
    state: Mutex<State>,
    /// When the first change that this proxy has not seen came in, and when it was marked.
    waiting: Mutex<Option<(Instant, Instant)>>,
    pub(super) wake: Notify,
    closed: AtomicBool,
}

#[derive(Debug)]
struct State {
    stream: Stream,
    placed: Option<Placed>,
    own: Own,
    names: HashMap<Arc<str>, u64>,
    types: BTreeMap<Arc<str>, TypeState>,
    /// What is to be removed once the proxy has taken what replaces it.
    removals: Option<Removals>,
}

#[derive(Debug, Clone)]
struct Placed {
    generation: u64,
    proxy: Arc<Proxy>,
    inbound_key: u64,
    view: Arc<View>,
}

#[derive(Debug)]
struct Removals {
    until: Instant,
    sets: Vec<(Arc<str>, Arc<ResourceSet>)>,
}

/// How far a proxy is with one type.
#[derive(Debug, Clone, Default)]
pub struct TypeState {
    /// Nonce of the last response, and when it was sent.
    pub sent: String,
    /// See `sent`.
    pub sent_at: Option<SystemTime>,
    /// Nonce of the last response that was accepted.
    pub acked: String,
    /// The last rejection, until a later response is accepted.
    pub rejected: Option<Rejection>,
    /// Names that are watched one by one.
    pub names: usize,
}

/// What to do after a request.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) responses: Vec<Response>,
}

impl Connection {
    pub(super) fn new(
        number: u64,
        node: Arc<Node>,
        mode: Mode,
        peer: String,
        caller: Option<Identity>,
    ) -> Self {
        Connection {
            number,
            id: format!("{}-{number}", node.workload),
            node,
            peer,
            caller,
            connected: SystemTime::now(),
            mode,
            state: Mutex::new(State {
                stream: Stream::new(mode),
                placed: None,
                own: Own::default(),
                names: HashMap::new(),
                types: BTreeMap::new(),
                removals: None,
            }),
            waiting: Mutex::default(),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
        }
    }

    /// The Istio version that the proxy says it is of.
    pub fn istio_version(&self) -> String {
        self.node
            .meta("ISTIO_VERSION")
            .unwrap_or("unknown")
            .to_owned()
    }

    /// How far it is, by type.
    pub fn types(&self) -> BTreeMap<Arc<str>, TypeState> {
        let state = self.state.lock();
        let mut out = state.types.clone();
        for status in state.stream.status() {
            let entry = out.entry(status.type_url.clone()).or_default();
            entry.sent = status.sent;
            entry.acked = status.acked;
            entry.names = status.names;
        }
        out
    }

    /// What it rejects now.
    pub fn rejections(&self) -> Vec<Rejection> {
        let state = self.state.lock();
        let types = state.types.values();
        types.filter_map(|t| t.rejected.clone()).collect()
    }

    /// Whether it asks for this resource by its name.
    pub(super) fn watches(&self, type_url: &str, name: &str) -> bool {
        let state = self.state.lock();
        state.stream.names(type_url).any(|n| &**n == name)
    }

    /// What it was sent of a type.
    pub fn sent(&self, type_url: &str) -> Option<Arc<ResourceSet>> {
        self.state.lock().stream.sent(type_url).cloned()
    }

    /// Ends the stream.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Marks it as behind; a mark that stands already keeps its time.
    pub(super) fn mark(&self, since: Instant) {
        self.waiting.lock().get_or_insert((since, Instant::now()));
        self.wake.notify_one();
    }

    /// Takes the mark off: when the first change came, and when the mark was set.
    pub(super) fn take_mark(&self) -> Option<(Instant, Instant)> {
        self.waiting.lock().take()
    }

    /// When removals are due although the proxy has not answered yet.
    pub(super) fn removals_due(&self) -> Option<Instant> {
        self.state.lock().removals.as_ref().map(|r| r.until)
    }

    /// Takes a request in and says what to send.
    pub(super) fn request(&self, server: &Server, push: &Push, request: &Request) -> Answer {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut answer = Answer::default();
        match state.stream.request(request) {
            Event::Respond { type_url, .. } => {
                state.names.remove(&type_url);
                state.types.entry(type_url.clone()).or_default();
                answer
                    .responses
                    .extend(self.bring(server, push, state, &type_url, Phase::All));
            }
            Event::Ack { type_url, .. } => {
                state.names.remove(&type_url);
                if let Some(t) = state.types.get_mut(&type_url) {
                    t.rejected = None;
                }
                if state.removals.is_some() && all_answered(&state.stream) {
                    answer.responses.extend(self.remove(server, push, state));
                }
            }
            Event::Nack {
                type_url,
                nonce,
                message,
            } => {
                let label = type_label(&type_url);
                server
                    .metrics
                    .count("pilot_total_xds_rejects", &[("type", &label)]);
                if let "cds" | "eds" | "lds" | "rds" = label.as_str() {
                    let node = [("node", &*self.node.id), ("err", "rejected")];
                    server
                        .metrics
                        .count(&format!("pilot_xds_{label}_reject"), &node);
                }
                let placed = self.place(server, push, state);
                let found = rejection::of(
                    server.scope(push),
                    &placed.proxy,
                    &type_url,
                    &state.stream,
                    nonce,
                    message,
                );
                tracing::warn!(
                    "{}: {} rejected: {found}",
                    xds::type_url::short(&type_url),
                    self.id
                );
                state.types.entry(type_url).or_default().rejected = Some(found);
                // Nothing is taken away while the proxy still stands on the old configuration.
                state.removals = None;
            }
            Event::Ignored => {
                // A subscription may have changed on the way.
                state.names.remove(request.type_url.as_str());
                if !request.nonce.is_empty() {
                    server.metrics.count(
                        "pilot_xds_expired_nonce",
                        &[("type", &type_label(&request.type_url))],
                    );
                }
            }
        }
        answer
    }

    /// Brings everything that the proxy watches to `push`; removals follow when it has answered.
    pub(super) fn push(&self, server: &Server, push: &Push, remove_at: Instant) -> Answer {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut answer = Answer::default();
        let mut sets = Vec::new();
        for type_url in watched(&state.stream) {
            let set = self.set(server, push, state, &type_url);
            let made = state
                .stream
                .update(&type_url, &set, &push.version, Phase::Upserts);
            if let Some(response) = made {
                self.note(server, &mut state.types, &response);
                answer.responses.push(response);
            }
            sets.push((type_url, set));
        }
        state.removals = Some(Removals {
            until: remove_at,
            sets,
        });
        if answer.responses.is_empty() && all_answered(&state.stream) {
            answer.responses = self.remove(server, push, state);
        }
        answer
    }

    /// Sends the removals that wait.
    pub(super) fn removals(&self, server: &Server, push: &Push) -> Answer {
        let mut state = self.state.lock();
        Answer {
            responses: self.remove(server, push, &mut state),
        }
    }

    fn remove(&self, server: &Server, push: &Push, state: &mut State) -> Vec<Response> {
        let Some(removals) = state.removals.take() else {
            return Vec::new();
        };
        let mut out = Vec::new();
        // What refers goes before what is referred to.
        for (type_url, set) in removals.sets.iter().rev() {
            if let Some(r) = state
                .stream
                .update(type_url, set, &push.version, Phase::Removals)
            {
                self.note(server, &mut state.types, &r);
                out.push(r);
            }
        }
        out
    }

    fn bring(
        &self,
        server: &Server,
        push: &Push,
        state: &mut State,
        type_url: &Arc<str>,
        phase: Phase,
    ) -> Option<Response> {
        let set = self.set(server, push, state, type_url);
        let response = state.stream.update(type_url, &set, &push.version, phase)?;
        self.note(server, &mut state.types, &response);
        Some(response)
    }

    /// The resources of a type as this proxy should hold them.
    fn set(
        &self,
        server: &Server,
        push: &Push,
        state: &mut State,
        type_url: &Arc<str>,
    ) -> Arc<ResourceSet> {
        let started = Instant::now();
        let placed = self.place(server, push, state);
        let scope = server.scope(push);
        let set = if is_whole(type_url, &self.node) {
            let key = placed.inbound_key;
            state
                .own
                .whole(scope, type_url, &placed.view, &placed.proxy, key)
        } else if is_named(type_url, &self.node) {
            let stream = &state.stream;
            let key = *state
                .names
                .entry(type_url.clone())
                .or_insert_with(|| names_key(stream.names(type_url)));
            placed
                .view
                .named(scope, type_url, &placed.proxy, key, stream.names(type_url))
        } else if let (SDS, Some(caller)) = (&**type_url, &self.caller) {
            // This proxy's alone, and kept nowhere.
            let names: Vec<&str> = state.stream.names(type_url).map(|n| &**n).collect();
            let found = secret::build(&push.mesh, caller, &names);
            if found.len() < names.len() {
                server
                    .metrics
                    .count("pilot_sds_certificate_errors_total", &[]);
            }
            let found = found.into_iter();
            let found = found.map(|r| Arc::new(xds::Resource::new(r.name, SDS, &r.value)));
            Arc::new(found.collect())
        } else {
            // Nothing of it is served here: an empty answer ends the client's waiting.
            Arc::default()
        };
        server.metrics.time(
            "pilot_xds_push_time",
            &[("type", &type_label(type_url))],
            started.elapsed(),
        );
        set
    }

    /// The proxy's place in the mesh of `push`.
    fn place(&self, server: &Server, push: &Push, state: &mut State) -> Placed {
        if let Some(placed) = &state.placed
            && (placed.generation == push.generation || push.same_place_since(placed.generation))
        {
            return placed.clone();
        }
        let proxy = Arc::new(Proxy::new(&push.mesh, self.node.clone()));
        let inbound_key = proxy.inbound_key(&push.mesh);
        let view = server.views.of(&push.mesh, &proxy, inbound_key);
        let placed = Placed {
            generation: push.generation,
            proxy,
            inbound_key,
            view,
        };
        state.placed = Some(placed.clone());
        placed
    }

    fn note(
        &self,
        server: &Server,
        types: &mut BTreeMap<Arc<str>, TypeState>,
        response: &Response,
    ) {
        let label = type_label(&response.type_url);
        let labels = [("type", label.as_str())];
        server.sent.fetch_add(1, Ordering::Relaxed);
        server.metrics.count("pilot_xds_pushes", &labels);
        server.metrics.observe(
            "pilot_xds_config_size_bytes",
            &labels,
            response.encoded_len() as f64,
        );
        types.entry(response.type_url.clone()).or_default().sent_at = Some(SystemTime::now());
    }
}

/// The types that a client watches, in the order of pushing.
fn watched(stream: &Stream) -> Vec<Arc<str>> {
    let mut out: Vec<Arc<str>> = stream.watched().cloned().collect();
    let place = |t: &Arc<str>| {
        PUSH_ORDER
            .iter()
            .position(|o| *o == &**t)
            .unwrap_or(PUSH_ORDER.len())
    };
    out.sort_by_key(place);
    out
}

fn all_answered(stream: &Stream) -> bool {
    stream.status().iter().all(|t| {
        t.sent == t.acked
            || t.rejected
                .as_ref()
                .is_some_and(|(nonce, _)| *nonce == t.sent)
    })
}

/// Types of which a proxy wants everything. A gRPC application names what it wants.
pub(super) fn is_whole(type_url: &str, node: &Node) -> bool {
    matches!(type_url, CDS | LDS | NDS) && !grpc::is_grpc(node)
}

/// Types of which a proxy wants what it names.
pub(super) fn is_named(type_url: &str, node: &Node) -> bool {
    matches!(type_url, EDS | RDS) || matches!(type_url, CDS | LDS) && grpc::is_grpc(node)
}
