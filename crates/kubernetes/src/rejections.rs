//! What proxies reject, from the replica that serves them to the one that writes reports.
//!
//! Only a proxy's own replica hears of a rejection. A replica that does not lead writes what it heard into one ConfigMap of
//! its revision, below its own name; the leader reads all of them. An install puts the ConfigMap in, so that the right to
//! change this one object is enough. Each replica is a field manager of its own, so that none touches what others said.
//!
//! An entry is renewed as long as it says something. One that is not renewed any more is of a replica that is gone: the
//! leader does not count it, and takes it out. Clocks of replicas are not compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    time::{Duration, Instant},
};

use config::{Kind, ObjectKey};
use futures_util::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, info, warn};

use crate::{FIELD_MANAGER, status::is_reported};

/// The ConfigMap's name; each revision has one (see [`crate::of_revision`]).
pub const CONFIG_MAP: &str = "istiod-rejections";

/// What proxies say of objects: which, and the proxy's reason.
pub type Rejections = BTreeSet<(ObjectKey, String)>;

/// What this replica does with what it hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It writes reports itself, and takes out what replicas left behind that are gone.
    Leads,
    /// It tells the leader.
    Tells(Rejections),
}

/// The ConfigMap as this replica uses it.
#[derive(Debug)]
pub struct Board {
    api: Api<ConfigMap>,
    name: String,
    replica: String,
    timing: Timing,
    entries: BTreeMap<String, Entry>,
    /// Whether it has been read.
    is_read: bool,
    /// When our own entry was last written.
    written: Option<Instant>,
    is_failing: bool,
}

/// How often entries are looked after.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Between two looks at what is to be said.
    pub look: Duration,
    /// An entry that is as old as this is written again.
    pub renew: Duration,
    /// An entry that was not renewed for this long is of a replica that is gone.
    pub stale: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            look: Duration::from_secs(1),
            renew: Duration::from_secs(10),
            stale: Duration::from_secs(30),
        }
    }
}

/// One replica's value in the ConfigMap.
#[derive(Debug)]
struct Entry {
    text: String,
    /// Since when it has been as it is.
    since: Instant,
    rejections: Rejections,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Written {
    /// For people; it makes a renewed entry differ from the one before.
    renewed: String,
    rejections: Vec<WrittenRejection>,
    /// How many there was no place for. The replica's log has them all.
    #[serde(default, skip_serializing_if = "is_zero")]
    more: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct WrittenRejection {
    kind: String,
    namespace: String,
    name: String,
    message: String,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Board {
    /// The board of a revision, for the replica of this name (a pod's).
    pub fn new(
        client: &Client,
        namespace: &str,
        revision: &str,
        replica: &str,
        timing: Timing,
    ) -> Self {
        Board {
            api: Api::namespaced(client.clone(), namespace),
            name: crate::of_revision(CONFIG_MAP, revision),
            replica: replica.to_owned(),
            timing,
            entries: BTreeMap::new(),
            is_read: false,
            written: None,
            is_failing: false,
        }
    }

    /// Says what this replica hears and passes on what the others say, until `stop` changes; then its entry is taken out.
    pub async fn run(
        mut self,
        mut stop: watch::Receiver<()>,
        role: impl Fn() -> Role,
        others: &watch::Sender<Rejections>,
    ) {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        let mut stream = pin!(watcher(self.api.clone(), config).default_backoff());
        let mut look = interval(self.timing.look);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut listed = BTreeMap::new();
        loop {
            tokio::select! {
                event = stream.next() => match event {
                    Some(Ok(Event::Init)) => listed = BTreeMap::new(),
                    Some(Ok(Event::InitApply(map))) => listed = map.data.unwrap_or_default(),
                    Some(Ok(Event::InitDone)) => self.read(std::mem::take(&mut listed)),
                    Some(Ok(Event::Apply(map))) => self.read(map.data.unwrap_or_default()),
                    Some(Ok(Event::Delete(_))) => self.read(BTreeMap::new()),
                    Some(Err(e)) => debug!("ConfigMap {}: {e}", self.name),
                    None => return,
                },
                _ = look.tick() => if self.is_read { self.write(&role()).await },
                _ = stop.changed() => break,
            }
            let heard = self.heard();
            others.send_if_modified(|old| {
                let differs = *old != heard;
                if differs {
                    *old = heard;
                }
                differs
            });
        }
        if self.entries.contains_key(&self.replica) {
            self.say(None).await;
        }
    }

    fn read(&mut self, data: BTreeMap<String, String>) {
        let now = Instant::now();
        let mut old = std::mem::take(&mut self.entries);
        for (replica, text) in data {
            let entry = match old.remove(&replica) {
                Some(entry) if entry.text == text => entry,
                _ => Entry {
                    since: now,
                    rejections: self.parsed(&replica, &text),
                    text,
                },
            };
            self.entries.insert(replica, entry);
        }
        self.is_read = true;
    }

    /// Whoever may write the ConfigMap may have written it: what cannot be read says nothing.
    fn parsed(&self, replica: &str, text: &str) -> Rejections {
        if text.len() > LARGEST_ENTRY {
            warn!(
                "ConfigMap {}: {replica} is longer than {LARGEST_ENTRY} bytes, and is not read",
                self.name
            );
            return Rejections::new();
        }
        let written: Written = match serde_json::from_str(text) {
            Ok(written) => written,
            Err(e) => {
                warn!("ConfigMap {}: {replica} cannot be read: {e}", self.name);
                return Rejections::new();
            }
        };
        let of = |r: WrittenRejection| {
            let mut kinds = Kind::ALL.iter().filter(|k| is_reported(**k));
            let kind = *kinds.find(|k| k.name() == r.kind)?;
            Some((
                ObjectKey::new(kind, r.namespace, r.name),
                shortened(&r.message).to_owned(),
            ))
        };
        written.rejections.into_iter().filter_map(of).collect()
    }

    /// What the others say that are still there.
    fn heard(&self) -> Rejections {
        let others = self.entries.iter().filter(|(name, entry)| {
            **name != self.replica && entry.since.elapsed() < self.timing.stale
        });
        others
            .flat_map(|(_, entry)| entry.rejections.iter().cloned())
            .collect()
    }

    async fn write(&mut self, role: &Role) {
        let none = Rejections::new();
        let (wanted, leads) = match role {
            Role::Leads => (&none, true),
            Role::Tells(rejections) => (rejections, false),
        };
        let ours = self.entries.get(&self.replica);
        let is_due = self
            .written
            .is_none_or(|at| at.elapsed() >= self.timing.renew);
        match ours {
            _ if wanted.is_empty() => {
                if ours.is_some() {
                    self.say(None).await;
                }
            }
            Some(entry) if !is_due && entry.rejections == written(wanted).1 => {}
            _ => self.say(Some(wanted)).await,
        }
        if leads {
            self.take_out().await;
        }
    }

    /// Writes this replica's entry, or takes it out.
    async fn say(&mut self, rejections: Option<&Rejections>) {
        let mut body = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": self.name},
        });
        if let Some(rejections) = rejections {
            let mut said = written(rejections).0;
            said.renewed = Timestamp::now().to_string();
            let text = serde_json::to_string(&said).unwrap_or_default();
            body["data"] = json!({ self.replica.as_str(): text });
        }
        // A manager's fields that it does not apply any more are taken out, and no one else's.
        let manager = format!("{FIELD_MANAGER}-{}", self.replica);
        let params = PatchParams::apply(cut(&manager, LONGEST_MANAGER)).force();
        let patch = Patch::Apply(&body);
        let patched = self.api.patch(&self.name, &params, &patch).await;
        self.took(patched);
        self.written = Some(Instant::now());
    }

    async fn take_out(&mut self) {
        let gone = self.entries.iter().filter(|(name, entry)| {
            **name != self.replica && entry.since.elapsed() >= self.timing.stale
        });
        let gone: BTreeMap<&String, ()> = gone.map(|(name, _)| (name, ())).collect();
        if gone.is_empty() {
            return;
        }
        let body = json!({ "data": gone });
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(&body);
        let patched = self.api.patch(&self.name, &params, &patch).await;
        self.took(patched);
    }

    fn took(&mut self, patched: Result<ConfigMap, kube::Error>) {
        match patched {
            Ok(map) => {
                if std::mem::take(&mut self.is_failing) {
                    info!("ConfigMap {} is written again", self.name);
                }
                self.read(map.data.unwrap_or_default());
            }
            Err(e) if std::mem::replace(&mut self.is_failing, true) => {
                debug!("ConfigMap {}: {e}", self.name);
            }
            Err(e) => warn!(
                "ConfigMap {} cannot be written: {e}; what proxies reject is reported by the leader's own alone",
                self.name
            ),
        }
    }
}

/// As many as there is place for, as they are written and as they are read again.
fn written(rejections: &Rejections) -> (Written, Rejections) {
    let mut out = Written::default();
    let mut kept = Rejections::new();
    let mut size = 0;
    for (key, message) in rejections {
        let one = WrittenRejection {
            kind: key.kind.name().to_owned(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            message: shortened(message).to_owned(),
        };
        size += serde_json::to_string(&one).map_or(LARGEST_ENTRY, |t| t.len() + 1);
        if size > LARGEST_SAID {
            out.more = rejections.len() - out.rejections.len();
            break;
        }
        kept.insert((key.clone(), one.message.clone()));
        out.rejections.push(one);
    }
    (out, kept)
}

/// A proxy's reason, not longer than a report needs it to be.
pub fn shortened(message: &str) -> &str {
    cut(message, LONGEST_MESSAGE)
}

fn cut(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}

/// Whether a ConfigMap is a board of some revision.
pub(crate) fn is_board(name: &str) -> bool {
    name.strip_prefix(CONFIG_MAP)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// The API server takes ConfigMaps up to 1 MiB: there is place for 30 replicas.
const LARGEST_SAID: usize = 32 << 10;
/// With the time and what surrounds the rejections.
const LARGEST_ENTRY: usize = LARGEST_SAID + 1024;
const LONGEST_MESSAGE: usize = 1024;
/// The API server's limit.
const LONGEST_MANAGER: usize = 128;

#[cfg(test)]
mod tests;
