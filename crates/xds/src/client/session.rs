//! What the client wants, holds and has to answer: the state that survives a broken stream.
//!
//! Feed it with [`Session::watch`], [`Session::connected`], the responses and their verdicts; drain
//! [`Session::next_request`] after each. It keeps the discipline that istiod checks for: every response is
//! answered exactly once and in order; an answer carries no subscription, and a request of its own accord always
//! changes one.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
};

use proto::{
    Any,
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        },
    },
    google::rpc::Status,
};

use crate::{Mode, type_url::is_wildcard};

/// Which resources of a type are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// Whatever there is.
    All,
    /// These names; none ends the subscription.
    Names(BTreeSet<String>),
}

/// A request to be sent.
#[derive(Debug, Clone, PartialEq)]
pub enum Outgoing {
    /// On a delta stream.
    Delta(DeltaDiscoveryRequest),
    /// On a state-of-the-world stream.
    Sotw(DiscoveryRequest),
}

/// A response, in the terms of both forms. It must be handed back to [`Session::answer`].
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// Its type.
    pub type_url: String,
    /// Version of the whole response.
    pub version: String,
    /// To be echoed by the answer.
    pub nonce: String,
    /// What is new or changed; for state of the world: everything that was sent.
    pub resources: Vec<ReceivedResource>,
    /// Names that are gone. In the state-of-the-world form: of a wildcard type, what is held and was not sent.
    pub removed: Vec<String>,
    /// What in it breaks the protocol (a name twice, a wrong type inside), by name and why. It is not among `resources`
    /// and `removed`, keeps its former version, and [`Session::answer`] rejects it.
    pub refused: Vec<(String, String)>,
    /// Why the response breaks the protocol as a whole: to be rejected.
    pub malformed: Option<String>,
}

/// A resource as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct ReceivedResource {
    /// Its name.
    pub name: String,
    /// Its own version, or the response's.
    pub version: String,
    /// The message, unopened: for dumps it must be kept as it came.
    pub resource: Any,
}

/// The client's side of ADS, across streams.
#[derive(Debug)]
pub struct Session {
    mode: Mode,
    node: Node,
    types: BTreeMap<String, Subscription>,
    order: Vec<String>,
    paused: BTreeSet<String>,
    outbox: VecDeque<Outgoing>,
    connected: bool,
    node_sent: bool,
}

#[derive(Debug)]
struct Subscription {
    want: Want,
    /// What the server was told on this stream; `None` before the first request.
    told: Option<Want>,
    held: BTreeMap<String, String>,
    version: String,
    nonce: String,
}

impl Session {
    /// A session of which nothing is wanted yet.
    pub fn new(mode: Mode, node: Node) -> Self {
        Self {
            mode,
            node,
            types: BTreeMap::new(),
            order: Vec::new(),
            paused: BTreeSet::new(),
            outbox: VecDeque::new(),
            connected: false,
            node_sent: false,
        }
    }

    /// Which form it speaks.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Sets what is wanted of a type. A type that is first wanted later is also asked for later on each new stream.
    pub fn watch(&mut self, type_url: &str, want: Want) {
        if !self.types.contains_key(type_url) {
            self.order.push(type_url.to_owned());
        }
        let subscription = self
            .types
            .entry(type_url.to_owned())
            .or_insert_with(|| Subscription {
                want: Want::Names(BTreeSet::new()),
                told: None,
                held: BTreeMap::new(),
                version: String::new(),
                nonce: String::new(),
            });
        if let Want::Names(names) = &want {
            subscription.held.retain(|name, _| names.contains(name));
        }
        subscription.want = want;
        self.tell(type_url);
    }

    /// A new stream is open: asks for everything again, naming what is held.
    pub fn connected(&mut self) {
        self.connected = true;
        self.node_sent = false;
        self.outbox.clear();
        for subscription in self.types.values_mut() {
            subscription.told = None;
            subscription.nonce.clear();
        }
        for type_url in self.order.clone() {
            self.tell(&type_url);
        }
    }

    /// The stream broke. What is held stays.
    pub fn disconnected(&mut self) {
        self.connected = false;
        self.outbox.clear();
    }

    /// Holds subscription changes of a type back while another type's response is applied, so that they go out as
    /// one (Envoy holds EDS while CDS is applied, and RDS while LDS is). Answers are never held back.
    pub fn pause(&mut self, type_url: &str) {
        self.paused.insert(type_url.to_owned());
    }

    /// Ends [`Session::pause`] and asks for what has gathered.
    pub fn resume(&mut self, type_url: &str) {
        if self.paused.remove(type_url) {
            self.tell(type_url);
        }
    }

    /// The next request to send, in order.
    pub fn next_request(&mut self) -> Option<Outgoing> {
        let mut request = self.outbox.pop_front()?;
        if !self.node_sent {
            self.node_sent = true;
            match &mut request {
                Outgoing::Delta(r) => r.node = Some(self.node.clone()),
                Outgoing::Sotw(r) => r.node = Some(self.node.clone()),
            }
        }
        Some(request)
    }

    /// The version that is held of a resource.
    pub fn held(&self, type_url: &str, name: &str) -> Option<&str> {
        self.types.get(type_url)?.held.get(name).map(String::as_str)
    }

    /// Takes a delta response in.
    pub fn received_delta(&mut self, response: DeltaDiscoveryResponse) -> Received {
        let mut removed = response.removed_resources;
        removed.extend(response.removed_resource_names.into_iter().map(|n| n.name));
        let version = response.system_version_info;
        let resources = response
            .resources
            .into_iter()
            .map(|r| {
                let resource = r.resource.unwrap_or_default();
                let name = if r.name.is_empty() {
                    embedded_name(&resource)
                } else {
                    r.name
                };
                ReceivedResource {
                    name,
                    version: r.version,
                    resource,
                }
            })
            .collect();
        self.take_in(
            response.type_url,
            version,
            response.nonce,
            resources,
            removed,
        )
    }

    /// Takes a state-of-the-world response in.
    pub fn received_sotw(&mut self, response: DiscoveryResponse) -> Received {
        let version = response.version_info;
        let resources: Vec<_> = response
            .resources
            .into_iter()
            .map(|resource| ReceivedResource {
                name: embedded_name(&resource),
                version: version.clone(),
                resource,
            })
            .collect();
        let sent: HashSet<_> = resources.iter().map(|r| r.name.as_str()).collect();
        // Only a type that is always sent whole can tell by silence that a resource is gone.
        let removed = match self.types.get(&response.type_url) {
            Some(s) if is_wildcard(&response.type_url) => s
                .held
                .keys()
                .filter(|n| !sent.contains(n.as_str()))
                .cloned()
                .collect(),
            _ => Vec::new(),
        };
        self.take_in(
            response.type_url,
            version,
            response.nonce,
            resources,
            removed,
        )
    }

    fn take_in(
        &mut self,
        type_url: String,
        version: String,
        nonce: String,
        mut resources: Vec<ReceivedResource>,
        mut removed: Vec<String>,
    ) -> Received {
        let refused = refuse(&type_url, &mut resources, &mut removed);
        let mut malformed = None;
        match self.types.get_mut(&type_url) {
            Some(s) => {
                s.nonce.clone_from(&nonce);
                // An answer to a subscription that was given up in the meantime is not wanted any more.
                if let Want::Names(names) = &s.want {
                    resources.retain(|r| names.contains(&r.name));
                }
            }
            None => malformed = Some(format!("{type_url:?} was not asked for")),
        }
        Received {
            type_url,
            version,
            nonce,
            resources,
            removed,
            refused,
            malformed,
        }
    }

    /// Answers a response: ACK when nothing was refused and `errors` is empty, else NACK with all of it, while the
    /// resources that are not named in `errors` count as taken (Envoy applies the good ones of a rejected response, too).
    pub fn answer(&mut self, received: &Received, errors: &[(String, String)]) {
        let Some(s) = self.types.get_mut(&received.type_url) else {
            return;
        };
        let malformed = received.malformed.as_ref();
        if malformed.is_none() {
            for r in &received.resources {
                if errors.iter().all(|(name, _)| *name != r.name) {
                    s.held.insert(r.name.clone(), r.version.clone());
                }
            }
            for name in &received.removed {
                s.held.remove(name);
            }
        }
        let message = malformed
            .cloned()
            .or_else(|| told(received.refused.iter().chain(errors)));
        if message.is_none() {
            s.version.clone_from(&received.version);
        }
        // 3 = INVALID_ARGUMENT
        let error_detail = message.map(|message| Status {
            code: 3,
            message,
            ..Status::default()
        });
        if !self.connected {
            return;
        }
        self.outbox.push_back(match self.mode {
            Mode::Delta => Outgoing::Delta(DeltaDiscoveryRequest {
                type_url: received.type_url.clone(),
                response_nonce: received.nonce.clone(),
                error_detail,
                ..DeltaDiscoveryRequest::default()
            }),
            Mode::Sotw => Outgoing::Sotw(DiscoveryRequest {
                version_info: s.version.clone(),
                type_url: received.type_url.clone(),
                resource_names: names(s.told.as_ref()),
                response_nonce: received.nonce.clone(),
                error_detail,
                ..DiscoveryRequest::default()
            }),
        });
    }

    /// Queues the request that brings the server from what it was told to what is wanted.
    fn tell(&mut self, type_url: &str) {
        if !self.connected || self.paused.contains(type_url) {
            return;
        }
        let Some(s) = self.types.get_mut(type_url) else {
            return;
        };
        if s.told.as_ref() == Some(&s.want) {
            return;
        }
        let nothing = matches!(&s.want, Want::Names(n) if n.is_empty());
        if s.told.is_none() && nothing {
            return;
        }
        let request = match self.mode {
            Mode::Sotw => Outgoing::Sotw(DiscoveryRequest {
                version_info: s.version.clone(),
                type_url: type_url.to_owned(),
                resource_names: names(Some(&s.want)),
                response_nonce: s.nonce.clone(),
                ..DiscoveryRequest::default()
            }),
            Mode::Delta => {
                let (before, first) = match &s.told {
                    Some(told) => (entries(told), false),
                    None => (BTreeSet::new(), true),
                };
                let now = entries(&s.want);
                let mut subscribe: Vec<_> = now.difference(&before).cloned().collect();
                // The first request of a wildcard type says so by naming nothing.
                if first && s.want == Want::All && is_wildcard(type_url) {
                    subscribe.clear();
                }
                Outgoing::Delta(DeltaDiscoveryRequest {
                    type_url: type_url.to_owned(),
                    resource_names_subscribe: subscribe,
                    resource_names_unsubscribe: before.difference(&now).cloned().collect(),
                    initial_resource_versions: if first {
                        s.held.clone().into_iter().collect()
                    } else {
                        Default::default()
                    },
                    ..DeltaDiscoveryRequest::default()
                })
            }
        };
        s.told = Some(s.want.clone());
        self.outbox.push_back(request);
    }
}

/// Takes out what no one version can be told of: names that came twice, names that are both there and gone, names beyond
/// measure, and resources of another type.
fn refuse(
    type_url: &str,
    resources: &mut Vec<ReceivedResource>,
    removed: &mut Vec<String>,
) -> Vec<(String, String)> {
    let mut wrong: BTreeMap<String, String> = BTreeMap::new();
    {
        let gone: HashSet<&str> = removed.iter().map(String::as_str).collect();
        let mut seen = HashSet::new();
        for r in resources.iter() {
            let why = if r.resource.type_url != type_url {
                format!(
                    "is a {:?} in a response of type {type_url:?}",
                    r.resource.type_url
                )
            } else if r.name.len() > LONGEST_NAME {
                format!(
                    "the name has {} bytes; at most {LONGEST_NAME} are taken",
                    r.name.len()
                )
            } else if !seen.insert(r.name.as_str()) {
                "duplicate resource name in one response".to_owned()
            } else if gone.contains(r.name.as_str()) {
                "is both sent and removed in one response".to_owned()
            } else {
                continue;
            };
            wrong.entry(r.name.clone()).or_insert(why);
        }
    }
    if wrong.is_empty() {
        return Vec::new();
    }
    resources.retain(|r| !wrong.contains_key(&r.name));
    removed.retain(|name| !wrong.contains_key(name));
    wrong.into_iter().collect()
}

/// The text of a rejection, or none. It is bounded: a control plane refuses a request that is too large, and with it the
/// whole stream.
fn told<'a>(errors: impl Iterator<Item = &'a (String, String)>) -> Option<String> {
    let mut out = String::new();
    let mut more = 0;
    for (name, why) in errors {
        let line = format!("{}: {why}", shown(name));
        if !out.is_empty() && out.len() + line.len() > LONGEST_ANSWER {
            more += 1;
            continue;
        }
        if !out.is_empty() {
            out.push('\n');
        }
        out.push_str(&line);
    }
    if out.len() > LONGEST_ANSWER {
        out.truncate(out.floor_char_boundary(LONGEST_ANSWER));
        out.push('…');
    }
    if more > 0 {
        out.push_str(&format!("\nand {more} more"));
    }
    (!out.is_empty()).then_some(out)
}

/// A resource's name as logs and answers tell it: not all of one that is beyond measure.
pub fn shown(name: &str) -> Cow<'_, str> {
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) if name.len() > LONGEST_NAME => format!("{}…", &name[..end]).into(),
        _ => name.into(),
    }
}

/// The longest name of a resource in bytes; Istio's have at most some hundreds.
const LONGEST_NAME: usize = 4096;

/// How many bytes of reasons a rejection tells; gRPC servers take 4 MiB unless told otherwise.
const LONGEST_ANSWER: usize = 256 << 10;

/// How many characters of a name beyond measure are told in an answer.
const SHOWN: usize = 100;

fn names(want: Option<&Want>) -> Vec<String> {
    match want {
        Some(Want::Names(names)) => names.iter().cloned().collect(),
        Some(Want::All) | None => Vec::new(),
    }
}

fn entries(want: &Want) -> BTreeSet<String> {
    match want {
        Want::All => BTreeSet::from(["*".to_owned()]),
        Want::Names(names) => names.clone(),
    }
}

/// The name inside a resource: field 1 of every type that travels on ADS.
fn embedded_name(resource: &Any) -> String {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Named {
        #[prost(string, tag = "1")]
        name: String,
    }
    <Named as prost::Message>::decode(resource.value.as_slice())
        .map(|n| n.name)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
