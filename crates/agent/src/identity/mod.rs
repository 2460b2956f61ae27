//! The workload's certificate: made, kept in memory, and replaced before it ends.
//!
//! [`options`] says where it comes from; [`authority`] has a fresh key certified; [`rotation`] knows when that is due;
//! [`Workload`] does it as long as the pod lives, and tells how it stands. What it holds is given out by
//! [`crate::sds`]. Keys are never written to disk, except where `OUTPUT_CERTS` asks for it.

mod authority;
pub mod options;
mod output;
pub mod rotation;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use base::backoff::Backoff;
use parking_lot::Mutex;
use tls::{
    certificate::Certificate,
    identity::Identity,
    trust::Trust,
    verify::{Role, Validation},
};
use tokio::sync::{Notify, watch};
use tracing::{error, info, warn};
use zeroize::Zeroizing;

pub use options::{Mounted, Options, Source};
pub use rotation::Term;

/// How often files and the clock are looked at: both can change without a sign.
const LOOK: Duration = Duration::from_secs(1);
/// Revocation lists beside the roots (ConfigMap `istio-ca-crl`).
const REVOCATION: &str = "crl/ca-crl.pem";

/// A certificate with its key, which is overwritten when it is dropped.
pub struct Pair {
    /// Leaf first, PEM.
    pub chain: String,
    /// PEM.
    pub key: Zeroizing<String>,
    /// What the leaf says.
    pub leaf: Arc<Certificate>,
    /// How long it is good.
    pub term: Term,
}

/// Without the key.
impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair")
            .field("leaf", &self.leaf)
            .field("term", &self.term)
            .finish_non_exhaustive()
    }
}

/// What the workload has now.
#[derive(Debug, Clone, Default)]
pub struct Current {
    /// Its certificate.
    pub pair: Option<Arc<Pair>>,
    /// Whom it trusts, PEM.
    pub roots: Option<Arc<str>>,
    /// Who is not trusted any more, PEM.
    pub revocation: Option<Arc<str>>,
}

/// The keeper of the workload's certificate.
#[derive(Debug)]
pub struct Workload {
    options: Options,
    current: watch::Sender<Current>,
    wanted: AtomicBool,
    nudge: Notify,
    progress: Mutex<Progress>,
    requests: AtomicU64,
    failures: AtomicU64,
    file_failures: AtomicU64,
}

/// How it goes.
#[derive(Debug, Default)]
struct Progress {
    /// Why there is no newer certificate, and since when that is so.
    failing: Option<(SystemTime, String)>,
    /// The roots of the authority's last answer.
    answered: Option<String>,
    /// Mounted roots and revocation lists as they were read last.
    seen: Vec<(PathBuf, Stamp)>,
    /// That the certificate has expired was said.
    told: bool,
    /// The root behind the certificate was dropped: peers do not believe it any more.
    orphaned: bool,
}

/// What tells one state of a file from another, symbolic links followed: the kubelet swaps the folder behind one.
pub(crate) type Stamp = Option<(u64, u64, i64, i64, u64)>;

impl Workload {
    /// Nothing is done until [`Workload::run`].
    pub fn new(options: Options) -> Arc<Self> {
        Arc::new(Self {
            wanted: AtomicBool::new(options.eager),
            options,
            current: watch::Sender::default(),
            nudge: Notify::new(),
            progress: Mutex::default(),
            requests: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            file_failures: AtomicU64::new(0),
        })
    }

    /// What there is now, and what follows. Whoever asks makes the certificate wanted.
    pub fn subscribe(&self) -> watch::Receiver<Current> {
        if !self.wanted.swap(true, Ordering::Relaxed) {
            self.nudge.notify_one();
        }
        self.current.subscribe()
    }

    /// Keeps the certificate good. Never ends.
    pub async fn run(self: Arc<Self>) {
        let mut backoff = Backoff::new(FIRST_WAIT, FIRST_CAP);
        let mut rest: Option<tokio::time::Instant> = None;
        loop {
            let mut wait = LOOK;
            if self.wanted.load(Ordering::Relaxed) {
                self.look_at_roots();
                let resting = rest.is_some_and(|until| tokio::time::Instant::now() < until);
                if self.due() && !resting {
                    match self.renew().await {
                        Ok(()) => {
                            let life = self.term().map_or(Duration::ZERO, |t| t.life());
                            // An authority that is down is asked ten times in a life, not more than once a second
                            // and not less than once a minute.
                            let cap = (life / 10).clamp(Duration::from_secs(1), MAX_CAP);
                            backoff = Backoff::new(FIRST_WAIT, cap);
                            rest = None;
                        }
                        Err(why) => {
                            let pause = backoff.next_wait();
                            self.failed(why, pause);
                            rest = Some(tokio::time::Instant::now() + pause);
                        }
                    }
                }
                self.tell_of_expiry();
                wait = self.pause(rest);
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.nudge.notified() => {}
            }
        }
    }

    /// Why the pod must not be called ready.
    pub fn not_ready(&self) -> Option<String> {
        if !self.wanted.load(Ordering::Relaxed) {
            return None;
        }
        let why = || match &self.progress.lock().failing {
            Some((_, why)) => why.clone(),
            None if matches!(self.options.source, Source::Files(_)) => {
                "nobody has replaced the mounted files".to_owned()
            }
            None => "it was just asked for".to_owned(),
        };
        let Some(term) = self.term() else {
            return Some(format!("no certificate for {} yet: {}", self.name(), why()));
        };
        let since = term.expired(self.options.clock.now())?;
        Some(format!(
            "the certificate of {} expired {} s ago: {}",
            self.name(),
            since.as_secs(),
            why()
        ))
    }

    /// What readiness tells beside its answer: that the certificate cannot be replaced, before it matters.
    pub fn detail(&self) -> String {
        let now = self.options.clock.now();
        match (&self.progress.lock().failing, self.term()) {
            (Some((since, why)), Some(term)) => format!(
                "the certificate cannot be replaced for {} s and is good for another {} s: {why}\n",
                now.duration_since(*since).unwrap_or_default().as_secs(),
                term.until.duration_since(now).unwrap_or_default().as_secs(),
            ),
            _ => String::new(),
        }
    }

    /// Figures for the scrape, under the names of Istio's agent.
    pub fn text(&self) -> String {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let mut out = format!(
            "# TYPE istio_agent_num_outgoing_requests counter\n\
             istio_agent_num_outgoing_requests{{request_type=\"csr\"}} {}\n\
             # TYPE istio_agent_num_failed_outgoing_requests counter\n\
             istio_agent_num_failed_outgoing_requests{{request_type=\"csr\"}} {}\n\
             # TYPE istio_agent_num_file_secret_failures_total counter\n\
             istio_agent_num_file_secret_failures_total {}\n",
            read(&self.requests),
            read(&self.failures),
            read(&self.file_failures),
        );
        if let Some(term) = self.term() {
            let now = self.options.clock.now();
            let left = match term.expired(now) {
                Some(since) => -since.as_secs_f64(),
                None => term
                    .until
                    .duration_since(now)
                    .unwrap_or_default()
                    .as_secs_f64(),
            };
            out.push_str(&format!(
                "# TYPE istio_agent_cert_expiry_seconds gauge\n\
                 istio_agent_cert_expiry_seconds{{resource_name=\"default\"}} {left}\n"
            ));
        }
        out
    }

    fn name(&self) -> String {
        match &self.options.source {
            Source::Authority { identity, .. } => identity.to_string(),
            Source::Files(files) => files.chain.display().to_string(),
        }
    }

    fn term(&self) -> Option<Term> {
        self.current.borrow().pair.as_ref().map(|pair| pair.term)
    }

    /// Whether another certificate is needed now.
    fn due(&self) -> bool {
        match &self.options.source {
            Source::Files(files) => {
                let progress = self.progress.lock();
                self.term().is_none() || progress.seen != stamps(files)
            }
            Source::Authority { .. } => {
                let now = self.options.clock.now();
                self.term().is_none_or(|term| term.due(now)) || self.progress.lock().orphaned
            }
        }
    }

    async fn renew(&self) -> Result<(), String> {
        match &self.options.source {
            Source::Files(files) => self.read(files),
            Source::Authority {
                control_plane,
                identity,
            } => {
                self.requests.fetch_add(1, Ordering::Relaxed);
                let now = self.options.clock.now();
                let left = self
                    .term()
                    .map(|t| t.until.duration_since(now).unwrap_or_default());
                let patience = authority::patience(left.unwrap_or_default());
                let signed =
                    authority::sign(control_plane, identity, &self.options, patience).await?;
                let pair = self.pair(signed.chain, Zeroizing::new(signed.key))?;
                let named = pair.leaf.uris.iter().map(AsRef::as_ref).collect::<Vec<_>>();
                if named != [identity.to_string()] {
                    warn!("the authority certified {named:?}; {identity} was asked for");
                }
                self.progress.lock().answered = Some(signed.roots);
                self.take(Some(pair))
            }
        }
    }

    /// Mounted files: all three, or none of them.
    fn read(&self, files: &Mounted) -> Result<(), String> {
        let seen = stamps(files);
        let read =
            |path: &Path| fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()));
        // What is being replaced file by file does not fit together for a moment, and is looked at again.
        let pair = self.pair(read(&files.chain)?, Zeroizing::new(read(&files.key)?))?;
        let roots = read(&files.roots)?;
        Trust::from_pem(roots.as_bytes()).map_err(|e| format!("{}: {e}", files.roots.display()))?;
        let mut progress = self.progress.lock();
        progress.answered = Some(roots);
        progress.seen = seen;
        drop(progress);
        self.take(Some(pair))
    }

    fn pair(&self, chain: String, key: Zeroizing<String>) -> Result<Pair, String> {
        let identity =
            Identity::from_pem(chain.as_bytes(), key.as_bytes()).map_err(|e| e.to_string())?;
        let now = self.options.clock.now();
        let leaf = identity.leaf().clone();
        let term = Term::of(&leaf, now, self.options.policy);
        if let Some(since) = term.expired(now)
            && matches!(self.options.source, Source::Authority { .. })
        {
            return Err(format!(
                "the certificate that came expired {} s ago: compare the clocks of this node and of the authority",
                since.as_secs()
            ));
        }
        Ok(Pair {
            chain,
            key,
            leaf,
            term,
        })
    }

    /// Puts a new certificate, or new roots, in force.
    fn take(&self, pair: Option<Pair>) -> Result<(), String> {
        let (roots, revocation) = self.trusted()?;
        if let Some(pair) = &pair {
            let mut progress = self.progress.lock();
            progress.failing = None;
            progress.told = false;
            drop(progress);
            info!(
                "a certificate for {} (serial {}), good for {} s",
                pair.leaf.uris.first().map_or("nobody", AsRef::as_ref),
                pair.leaf.serial,
                pair.term.life().as_secs()
            );
        }
        let pair = pair.map(Arc::new);
        self.current.send_if_modified(|current| {
            let before = (current.roots.clone(), current.revocation.clone());
            current.roots = Some(roots.into());
            current.revocation = revocation.map(Into::into);
            let changed = before != (current.roots.clone(), current.revocation.clone());
            if changed && before.0.is_some() {
                info!("the roots that peers are trusted by have changed");
            }
            match pair {
                Some(pair) => {
                    current.pair = Some(pair);
                    true
                }
                None => changed,
            }
        });
        let current = self.current.borrow().clone();
        self.progress.lock().orphaned = !is_trusted(&current, self.options.clock.now());
        let Some(folder) = &self.options.output else {
            return Ok(());
        };
        output::write(folder, &current).inspect_err(|_| {
            self.file_failures.fetch_add(1, Ordering::Relaxed);
        })
    }

    /// The roots of the authority's answer and those that are mounted, each once.
    fn trusted(&self) -> Result<(String, Option<String>), String> {
        let answered = self.progress.lock().answered.clone().unwrap_or_default();
        if matches!(self.options.source, Source::Files(_)) {
            return Ok((answered, None));
        }
        let mounted = fs::read_to_string(&self.options.roots).unwrap_or_default();
        // By their hashes: the same roots are the same bundle, and are not pushed again.
        let mut all = BTreeMap::new();
        for text in [&answered, &mounted] {
            if text.trim().is_empty() {
                continue;
            }
            let trust = Trust::from_pem(text.as_bytes()).map_err(|e| format!("roots: {e}"))?;
            all.extend(trust.certificates().map(|c| (c.sha256, c.pem())));
        }
        let bundle = all.into_values().collect();
        let revocation = fs::read_to_string(self.revocation())
            .ok()
            .filter(|text| tls::trust::revocation_lists(text.as_bytes()).is_ok());
        Ok((bundle, revocation))
    }

    fn revocation(&self) -> PathBuf {
        let folder = self.options.roots.parent().unwrap_or(Path::new("/"));
        folder.join(REVOCATION)
    }

    /// Takes mounted roots and revocation lists in when they have changed.
    fn look_at_roots(&self) {
        if matches!(self.options.source, Source::Files(_)) {
            return;
        }
        let files = [self.options.roots.clone(), self.revocation()];
        let now = files.map(|path| {
            let stamp = stamp(&path);
            (path, stamp)
        });
        let mut progress = self.progress.lock();
        if progress.seen == now {
            return;
        }
        progress.seen = now.to_vec();
        // Before the first answer nobody knows whether these are all.
        if progress.answered.is_none() {
            return;
        }
        drop(progress);
        if let Err(why) = self.take(None) {
            self.file_failures.fetch_add(1, Ordering::Relaxed);
            warn!("{why}; the former roots stay in force");
        }
    }

    fn failed(&self, why: String, pause: Duration) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let now = self.options.clock.now();
        let left = self
            .term()
            .map(|t| t.until.duration_since(now).unwrap_or_default());
        let mut progress = self.progress.lock();
        match left {
            None => warn!("no certificate: {why}; again in {pause:.1?}"),
            Some(left) => warn!(
                "the certificate is not replaced: {why}; it is good for another {} s; again in {pause:.1?}",
                left.as_secs()
            ),
        }
        let since = progress.failing.as_ref().map_or(now, |(since, _)| *since);
        progress.failing = Some((since, why));
    }

    /// Said once for each certificate.
    fn tell_of_expiry(&self) {
        let Some(why) = self
            .term()
            .and_then(|t| t.expired(self.options.clock.now()))
        else {
            return;
        };
        let mut progress = self.progress.lock();
        if !std::mem::replace(&mut progress.told, true) {
            error!(
                "the certificate of {} has expired {} s ago: peers refuse it until there is another",
                self.name(),
                why.as_secs()
            );
        }
    }

    /// Until something may be due.
    fn pause(&self, rest: Option<tokio::time::Instant>) -> Duration {
        let next = match (rest, self.term()) {
            (Some(until), _) => until.duration_since(tokio::time::Instant::now()),
            (None, Some(term)) => term.wait(self.options.clock.now()),
            (None, None) => LOOK,
        };
        next.clamp(Duration::from_millis(10), LOOK)
    }
}

/// The first attempts follow close upon another: a pod waits for its certificate.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const FIRST_CAP: Duration = Duration::from_secs(2);
/// The longest pause between two attempts.
const MAX_CAP: Duration = Duration::from_secs(60);

/// Whether peers with the same roots can believe a certificate: one whose root was dropped is to be replaced at once.
fn is_trusted(current: &Current, now: SystemTime) -> bool {
    let (Some(pair), Some(roots)) = (&current.pair, &current.roots) else {
        return true;
    };
    let Ok(trust) = Trust::from_pem(roots.as_bytes()) else {
        return true;
    };
    let Ok(chain) = Trust::from_pem(pair.chain.as_bytes()) else {
        return true;
    };
    let validation = Validation {
        trust: Some(Arc::new(trust)),
        // Time is looked at elsewhere.
        allow_expired: true,
        ..Validation::default()
    };
    let since = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let now = rustls::pki_types::UnixTime::since_unix_epoch(since);
    let Some((leaf, rest)) = chain.ders().split_first() else {
        return true;
    };
    validation
        .judge(leaf, rest, Role::Client, None, now)
        .is_ok()
}

fn stamps(files: &Mounted) -> Vec<(PathBuf, Stamp)> {
    [&files.chain, &files.key, &files.roots]
        .map(|path| (path.clone(), stamp(path)))
        .to_vec()
}

/// What a file looks like now; `None` where there is none.
pub(crate) fn stamp(path: &Path) -> Stamp {
    let found = fs::metadata(path).ok()?;
    Some((
        found.dev(),
        found.ino(),
        found.mtime(),
        found.mtime_nsec(),
        found.size(),
    ))
}
