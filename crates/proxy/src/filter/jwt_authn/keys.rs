//! The keys of one provider on one worker: from the configuration, from a file, or fetched.
//!
//! One request fetches for all that come meanwhile, in a task of its own: a client that goes away takes nothing with
//! it. After a failure the issuer is left alone for a while.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use base::backoff::Backoff;
use bytes::Bytes;
use outrigger_http::{Method, RequestHead, Version};
use tls::jwt::{KeySet, keys::MAX_BYTES};
use tokio::{sync::Notify, time::Instant};

use super::{
    super::{Answer, Pending},
    JwtStats,
};
use crate::{
    http::side_call,
    plan::jwt_authn::{JwtProvider, KeySource, RemoteKeys},
    worker::{Worker, WorkerRef},
};

/// Where the keys of a provider are.
#[derive(Debug)]
pub(super) enum Keys {
    Here(Option<Arc<KeySet>>),
    Remote(Rc<Remote>),
}

/// The keys as they are now.
#[derive(Debug)]
pub(super) enum Known {
    /// With the number of the fetch that they came by.
    Keys(Arc<KeySet>, u64),
    /// The configuration has none that are any good.
    None,
    /// They could not be fetched.
    NotFetched,
}

impl Known {
    /// Tells keys that were fetched at different times apart.
    pub(super) fn generation(&self) -> u64 {
        match self {
            Self::Keys(_, generation) => *generation,
            Self::None | Self::NotFetched => u64::MAX,
        }
    }
}

/// Keys of a server.
#[derive(Debug)]
pub(super) struct Remote {
    provider: Arc<JwtProvider>,
    plan: RemoteKeys,
    keys: RefCell<Option<(Arc<KeySet>, Instant)>>,
    generation: Cell<u64>,
    failed: Cell<Option<Instant>>,
    /// A task that fetches, or that keeps fetching, is there.
    fetching: Cell<bool>,
    fetched: Notify,
}

impl Keys {
    pub(super) fn new(provider: &Arc<JwtProvider>) -> Self {
        match &provider.keys {
            KeySource::Inline(inline) => Self::Here(inline.keys().cloned()),
            KeySource::File(path) => {
                let read = std::fs::read(path).map_err(|error| error.to_string());
                let keys =
                    read.and_then(|text| KeySet::parse(&text).map_err(|error| error.to_string()));
                Self::Here(match keys {
                    Ok(keys) => Some(Arc::new(keys)),
                    Err(error) => {
                        tracing::error!(
                            provider = &*provider.name,
                            file = %path.display(),
                            error,
                            "every token of this provider is refused: local_jwks"
                        );
                        None
                    }
                })
            }
            KeySource::Remote(plan) => Self::Remote(Rc::new(Remote {
                provider: provider.clone(),
                plan: plan.clone(),
                keys: RefCell::default(),
                generation: Cell::new(0),
                failed: Cell::default(),
                fetching: Cell::default(),
                fetched: Notify::new(),
            })),
        }
    }

    /// The keys that tokens are judged by now.
    pub(super) fn known(&self) -> Known {
        match self {
            Self::Here(Some(keys)) => Known::Keys(keys.clone(), 0),
            Self::Here(None) => Known::None,
            Self::Remote(remote) => match remote.current() {
                Some(keys) => Known::Keys(keys, remote.generation.get()),
                None => Known::NotFetched,
            },
        }
    }

    /// Whether there are none that may be used, and asking makes sense.
    pub(super) fn is_due(&self) -> bool {
        match self {
            Self::Here(_) => false,
            Self::Remote(remote) => remote.current().is_none() && !remote.rests(),
        }
    }

    /// Waits for a fetch that is under way, or begins one.
    pub(super) fn fetch(&self, worker: &Worker, stats: &Rc<JwtStats>) -> Pending {
        let Self::Remote(remote) = self else {
            return Box::pin(std::future::ready(Answer::Ready));
        };
        if !remote.fetching.replace(true) {
            let worker = worker.weak();
            tokio::task::spawn_local(run(Rc::downgrade(remote), worker, stats.clone()));
        }
        let remote = remote.clone();
        Box::pin(async move {
            loop {
                let fetched = remote.fetched.notified();
                if remote.current().is_some() || remote.rests() {
                    return Answer::Ready;
                }
                fetched.await;
            }
        })
    }
}

/// Waits for all of them.
pub(super) fn all(mut waits: Vec<Pending>) -> Pending {
    match waits.len() {
        1 => waits.remove(0),
        _ => Box::pin(async move {
            for wait in waits {
                wait.await;
            }
            Answer::Ready
        }),
    }
}

impl Remote {
    /// Keys that are fresh, or that a task keeps fresh.
    fn current(&self) -> Option<Arc<KeySet>> {
        let keys = self.keys.borrow();
        let (keys, at) = keys.as_ref()?;
        let fresh = self.plan.ahead.is_some() || at.elapsed() < self.plan.cache_duration;
        fresh.then(|| keys.clone())
    }

    /// A fetch has just failed.
    fn rests(&self) -> bool {
        let rest = self.plan.ahead.unwrap_or(REST);
        self.failed.get().is_some_and(|at| at.elapsed() < rest)
    }
}

/// Fetches once, or, where the configuration wants it, again and again as long as the filter is there.
async fn run(remote: Weak<Remote>, worker: WorkerRef, stats: Rc<JwtStats>) {
    loop {
        let Some(this) = remote.upgrade() else { return };
        let got = fetch(&this, &worker).await;
        match got {
            Ok(keys) => {
                stats.jwks_fetch_success().inc();
                this.generation.set(this.generation.get() + 1);
                *this.keys.borrow_mut() = Some((Arc::new(keys), Instant::now()));
                this.failed.set(None);
            }
            Err(error) => {
                stats.jwks_fetch_failed().inc();
                tracing::warn!(
                    provider = &*this.provider.name,
                    cluster = &*this.plan.cluster,
                    error,
                    "the keys of an issuer could not be fetched"
                );
                this.failed.set(Some(Instant::now()));
            }
        }
        let pause = match this.plan.ahead {
            None => None,
            Some(again) if this.failed.get().is_some() => Some(again),
            Some(_) => Some(
                this.plan
                    .cache_duration
                    .checked_sub(AHEAD)
                    .filter(|pause| *pause >= REST)
                    .unwrap_or(this.plan.cache_duration),
            ),
        };
        this.fetching.set(pause.is_some());
        this.fetched.notify_waiters();
        drop(this);
        match pause {
            Some(pause) => tokio::time::sleep(pause).await,
            None => return,
        }
    }
}

async fn fetch(remote: &Remote, worker: &WorkerRef) -> Result<KeySet, String> {
    let plan = &remote.plan;
    let mut backoff = Backoff::new(plan.backoff.0, plan.backoff.1);
    let mut left = plan.retries;
    loop {
        let got = once(plan, worker).await;
        if got.is_ok() || left == 0 {
            return got;
        }
        left -= 1;
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

async fn once(plan: &RemoteKeys, worker: &WorkerRef) -> Result<KeySet, String> {
    let worker = worker.upgrade().ok_or("the worker ends")?;
    let mut head = RequestHead::new(Version::Http11, Method::Get, &plan.authority, &plan.path);
    head.headers.set("accept", "application/json");
    let request = (head, Bytes::new());
    // A redirect is an answer like any other that is not 200: where keys come from is for the configuration to say.
    let answer = side_call(
        &worker,
        &plan.cluster,
        request,
        false,
        MAX_BYTES,
        Some(plan.timeout),
    )
    .await
    .map_err(|error| error.to_string())?;
    if answer.head.status != 200 {
        return Err(format!("the answer is {}", answer.head.status));
    }
    KeySet::parse(&answer.body).map_err(|error| error.to_string())
}

/// How long an issuer is left alone after a failure.
const REST: Duration = Duration::from_secs(1);
/// How long before the end of their time keys are fetched again, as in Envoy.
const AHEAD: Duration = Duration::from_secs(5);
