//! The keys of token issuers, fetched from where RequestAuthentication says (`jwksUri`, or what the issuer publishes about
//! itself) and put into the objects before anything is made of them.
//!
//! Keys that were once fetched stay in force until others are: an issuer that is down for a while stops nobody who is
//! known. Without any, tokens of the issuer are refused, and the object has a problem that says why. This file knows when
//! to fetch and what to keep; [`super::fetch`] knows how.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use base::clock::Clock;
use config::{Kind, Object, ObjectKey, Snapshot, Table};
use parking_lot::Mutex;
use proto::istio::security::v1beta1::{JwtRule, RequestAuthentication};
use tls::jwt::KeySet;
use tokio::{sync::Notify, task::JoinSet};

use super::fetch::{self, FetchError, Fetcher};

/// Where the keys of a rule come from, and how long an answer may take.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A key set.
    Jwks(String),
    /// An issuer whose `/.well-known/openid-configuration` names the key set.
    Issuer(String),
}

impl Place {
    /// `None` where the keys stand in the rule.
    pub fn of(rule: &JwtRule) -> Option<Self> {
        match (&*rule.jwks, &*rule.jwks_uri, &*rule.issuer) {
            ("", "", issuer) => Some(Self::Issuer(issuer.to_owned())),
            ("", uri, _) => Some(Self::Jwks(uri.to_owned())),
            _ => None,
        }
    }
}

/// What is known of one place.
#[derive(Debug, Clone, Default)]
struct Entry {
    keys: Option<Arc<str>>,
    /// Why the last attempt failed.
    failure: Option<String>,
    /// Failed attempts in a row.
    failures: u32,
    /// When to ask next, in seconds of the clock; 0: at once.
    next: u64,
    asking: bool,
    timeout: Option<Duration>,
}

/// All keys that are fetched.
#[derive(Debug)]
pub struct KeySets {
    entries: Mutex<BTreeMap<Place, Entry>>,
    filled: Mutex<Option<Filled>>,
    clock: Clock,
    /// How long keys are used before they are asked for again.
    refresh: Duration,
    fetcher: Fetcher,
    wanted: Notify,
}

/// The last result of [`KeySets::fill`], so that nothing seems to change where nothing has.
#[derive(Debug)]
struct Filled {
    from: Table<RequestAuthentication>,
    keys: BTreeMap<Place, Arc<str>>,
    to: Table<RequestAuthentication>,
}

impl Default for KeySets {
    fn default() -> Self {
        Self::new(Clock::system(), Fetcher::from_env())
    }
}

impl KeySets {
    /// Without any keys yet.
    fn new(clock: Clock, fetcher: Fetcher) -> Self {
        Self {
            entries: Mutex::default(),
            filled: Mutex::default(),
            clock,
            refresh: refresh_interval(),
            fetcher,
            wanted: Notify::new(),
        }
    }

    /// The objects with the keys that there are; the same tables as before where nothing has changed.
    pub fn fill(&self, snapshot: Arc<Snapshot>) -> Arc<Snapshot> {
        self.want(&snapshot);
        let keys = self.known();
        let from = &snapshot.request_authentications;
        let has_place = |o: &Arc<Object<RequestAuthentication>>| {
            o.spec
                .jwt_rules
                .iter()
                .any(|rule| Place::of(rule).is_some())
        };
        if !from.iter().any(has_place) {
            return snapshot;
        }
        let mut filled = self.filled.lock();
        let table = match &*filled {
            Some(last) if last.from.same(from) && last.keys == keys => last.to.clone(),
            last => {
                let mut table = from.clone();
                for object in from.iter().filter(|o| has_place(o)) {
                    let object = with_keys(object, &keys);
                    let (namespace, name) = (&object.meta.namespace, &object.meta.name);
                    let known = last.as_ref().and_then(|last| last.to.get(namespace, name));
                    // Proxies of a policy that is as before are left alone.
                    table.insert(match known {
                        Some(known) if same(known, &object) => known.clone(),
                        _ => Arc::new(object),
                    });
                }
                *filled = Some(Filled {
                    from: from.clone(),
                    keys,
                    to: table.clone(),
                });
                table
            }
        };
        let mut snapshot = Snapshot::clone(&snapshot);
        snapshot.request_authentications = table;
        Arc::new(snapshot)
    }

    /// Why a rule has no keys, or old ones: `Err` for none.
    pub fn state(&self, rule: &JwtRule) -> Result<Option<String>, String> {
        let Some(place) = Place::of(rule) else {
            return Ok(None);
        };
        let entries = self.entries.lock();
        let Some(entry) = entries.get(&place) else {
            return Err("they are not fetched yet".to_owned());
        };
        match (&entry.keys, &entry.failure) {
            (Some(_), failure) => Ok(failure.clone()),
            (None, Some(failure)) => Err(failure.clone()),
            (None, None) => Err("they are not fetched yet".to_owned()),
        }
    }

    /// Fetches what is due until nothing is, or for so long; for the start, before the first proxy is served.
    pub async fn settle(self: &Arc<Self>, longest: Duration) {
        let all = async {
            let mut tasks = self.begin();
            while tasks.join_next().await.is_some() {}
        };
        // What is late comes with a later push.
        let _ = tokio::time::timeout(longest, all).await;
    }

    /// Keeps fetching; `changed` is called with the objects whose keys are new, or whose problem is another.
    pub async fn run(
        self: Arc<Self>,
        snapshot: impl Fn() -> Option<Arc<Snapshot>>,
        mut changed: impl FnMut(BTreeSet<ObjectKey>),
    ) {
        loop {
            let mut tasks = self.begin();
            let mut news = BTreeSet::new();
            while let Some(done) = tasks.join_next().await {
                if let Ok(Some(place)) = done {
                    news.insert(place);
                }
            }
            if !news.is_empty()
                && let Some(snapshot) = snapshot()
            {
                changed(objects(&snapshot, &news));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = self.wanted.notified() => {}
            }
        }
    }

    /// Starts a task for each place that is due.
    fn begin(self: &Arc<Self>) -> JoinSet<Option<Place>> {
        let mut tasks = JoinSet::new();
        for (place, timeout) in self.due() {
            let this = self.clone();
            tasks.spawn(async move {
                let got = this.fetcher.fetch(&place, timeout).await;
                this.got(&place, got).then_some(place)
            });
        }
        tasks
    }

    /// The places to ask now; they count as being asked.
    fn due(&self) -> Vec<(Place, Duration)> {
        let now = self.clock.seconds();
        let mut entries = self.entries.lock();
        let due = entries.iter_mut().filter(|(_, entry)| {
            // A clock that was set back must not stop us.
            let far = entry.next > now.saturating_add(self.refresh.as_secs());
            !entry.asking && (entry.next <= now || far)
        });
        due.map(|(place, entry)| {
            entry.asking = true;
            (place.clone(), entry.timeout.unwrap_or(fetch::TIMEOUT))
        })
        .collect()
    }

    /// Takes an answer; whether it makes a difference.
    fn got(&self, place: &Place, answer: Result<String, FetchError>) -> bool {
        let now = self.clock.seconds();
        let mut entries = self.entries.lock();
        // Nobody wants it any more.
        let Some(entry) = entries.get_mut(place) else {
            return false;
        };
        entry.asking = false;
        let answer = answer.and_then(|text| match KeySet::parse(text.as_bytes()) {
            Ok(_) => Ok(text),
            Err(error) => Err(FetchError::Keys(error)),
        });
        match answer {
            Ok(text) => {
                let same = entry.keys.as_deref() == Some(&*text) && entry.failure.is_none();
                entry.keys = Some(text.into());
                entry.failure = None;
                entry.failures = 0;
                entry.next = now.saturating_add(self.refresh.as_secs().max(1));
                !same
            }
            Err(error) => {
                let wait = RETRY << entry.failures.min(10);
                let wait = wait
                    .min(self.refresh.as_secs().max(RETRY))
                    .min(LONGEST_RETRY);
                entry.failures = entry.failures.saturating_add(1);
                entry.next = now.saturating_add(wait);
                let failure = error.to_string();
                let same = entry.failure.as_ref() == Some(&failure);
                entry.failure = Some(failure);
                !same
            }
        }
    }

    /// Takes note of the places that these objects name, and forgets all others.
    fn want(&self, snapshot: &Snapshot) {
        let mut wanted: BTreeMap<Place, Option<Duration>> = BTreeMap::new();
        for object in snapshot.request_authentications.iter() {
            for rule in &object.spec.jwt_rules {
                if let Some(place) = Place::of(rule) {
                    let timeout = rule.timeout.and_then(|t| Duration::try_from(t).ok());
                    let known = wanted.entry(place).or_default();
                    *known = (*known).max(timeout.filter(|t| !t.is_zero()));
                }
            }
        }
        let mut entries = self.entries.lock();
        entries.retain(|place, _| wanted.contains_key(place));
        let mut news = false;
        for (place, timeout) in wanted {
            news |= !entries.contains_key(&place);
            entries.entry(place).or_default().timeout = timeout;
        }
        if news {
            self.wanted.notify_one();
        }
    }

    fn known(&self) -> BTreeMap<Place, Arc<str>> {
        let entries = self.entries.lock();
        let known = |(place, entry): (&Place, &Entry)| Some((place.clone(), entry.keys.clone()?));
        entries.iter().filter_map(known).collect()
    }
}

fn with_keys(
    object: &Object<RequestAuthentication>,
    keys: &BTreeMap<Place, Arc<str>>,
) -> Object<RequestAuthentication> {
    let mut object = object.clone();
    for rule in &mut object.spec.jwt_rules {
        if let Some(keys) = Place::of(rule).and_then(|place| keys.get(&place)) {
            rule.jwks = keys.to_string();
        }
    }
    object
}

fn same(one: &Object<RequestAuthentication>, other: &Object<RequestAuthentication>) -> bool {
    one.meta == other.meta && one.spec == other.spec && one.source == other.source
}

/// The objects that take keys from one of these places.
fn objects(snapshot: &Snapshot, places: &BTreeSet<Place>) -> BTreeSet<ObjectKey> {
    let takes = |o: &&Arc<Object<RequestAuthentication>>| {
        let mut rules = o.spec.jwt_rules.iter();
        rules.any(|rule| Place::of(rule).is_some_and(|place| places.contains(&place)))
    };
    let all = snapshot.request_authentications.iter().filter(takes);
    all.map(|o| {
        ObjectKey::new(
            Kind::RequestAuthentication,
            &*o.meta.namespace,
            &*o.meta.name,
        )
    })
    .collect()
}

/// `PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`, default 20 min.
fn refresh_interval() -> Duration {
    std::env::var("PILOT_JWT_PUB_KEY_REFRESH_INTERVAL")
        .ok()
        .and_then(|text| config::duration_nanos(&text))
        .and_then(|nanos| u64::try_from(nanos).ok())
        .map(Duration::from_nanos)
        .filter(|interval| *interval >= Duration::from_secs(1))
        .unwrap_or(Duration::from_secs(20 * 60))
}

/// Seconds until a place that failed is asked again, doubled each time.
const RETRY: u64 = 1;
const LONGEST_RETRY: u64 = 60;
/// How often to look what is due. The clock may be set, so that there is no time to sleep to.
const LOOK: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests;
