//! Workers: one thread each, with everything that a connection needs on it.
//!
//! A worker is a thread with a single-threaded runtime. It owns its listening sockets, its view of clusters and routes,
//! its pools and its counters; nothing on the way of a request crosses threads but what `cluster/shared.rs` lists.
//! Changes come from the main thread as batches and are applied between two polls, so a request that holds a plan
//! keeps it to its end and one that begins sees all of a batch or nothing.

pub mod drain;
pub(crate) mod moment;
mod random;
mod run;

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use base::clock::Clock;
use tokio::{
    net::TcpStream,
    sync::mpsc::{self, error::SendError},
};

pub use random::Random;
pub(crate) use run::{Command, Seed, Timing, WorkerChange, WorkerHandle, spawn};

use crate::{
    cluster::{Clusters, shared::ProcessShared},
    listener::Listeners,
    plan::{Bootstrap, RouteConfiguration},
    report::Reports,
};
use drain::DrainStrategy;
use stats::Stats;

/// What the command line says about the process, with Envoy's defaults.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of workers.
    pub concurrency: usize,
    /// How long a drain takes. Default 600 s (Istio passes 45).
    pub drain_time: Duration,
    /// How the end of connections is spread over it.
    pub drain_strategy: DrainStrategy,
    /// When an old process would have to end. Default 900 s.
    pub parent_shutdown_time: Duration,
    /// How often access logs are written out. Default 10 s.
    pub file_flush_interval: Duration,
    /// Restart epoch, for `/server_info`.
    pub restart_epoch: u32,
    /// The arguments as given, for `/server_info`.
    pub command_line: Vec<String>,
    /// What decisions about the validity of tokens go by.
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            concurrency: 1,
            drain_time: Duration::from_secs(600),
            drain_strategy: DrainStrategy::Gradual,
            parent_shutdown_time: Duration::from_secs(900),
            file_flush_interval: Duration::from_secs(10),
            restart_epoch: 0,
            command_line: Vec::new(),
            clock: Clock::system(),
        }
    }
}

/// What everything on a worker's thread can reach.
#[derive(Debug)]
pub struct Worker {
    /// Number of this worker, from 0.
    pub index: usize,
    /// What the process began with.
    pub bootstrap: Arc<Bootstrap>,
    /// What the command line said.
    pub options: Arc<Options>,
    /// This thread's counters.
    pub stats: Stats,
    /// This thread's random numbers.
    pub random: Rc<Random>,
    /// Clusters.
    pub clusters: Clusters,
    /// Route configurations that came by name.
    pub routes: Routes,
    /// What all workers share.
    pub shared: Arc<ProcessShared>,
    pub(crate) listeners: Listeners,
    pub(crate) reports: Reports,
    /// Itself, for tasks that outlive who began them.
    me: WorkerRef,
    /// The ways to all workers, this one included.
    pub(crate) peers: Vec<mpsc::UnboundedSender<Command>>,
}

/// A worker that may have ended.
pub(crate) type WorkerRef = Weak<Worker>;

impl Worker {
    /// For a task of its own.
    pub(crate) fn weak(&self) -> WorkerRef {
        self.me.clone()
    }

    /// Gives an accepted connection to the worker with the fewest, where that is another one; else it comes back.
    pub(crate) fn hand_over(
        &self,
        listener: &Arc<str>,
        stream: TcpStream,
        peer: SocketAddr,
    ) -> Option<TcpStream> {
        let load = |index: usize| self.shared.workers[index].load(Relaxed);
        let least = (0..self.peers.len()).min_by_key(|&index| load(index))?;
        if load(least) >= load(self.index) {
            return Some(stream);
        }
        let stream = stream.into_std().ok()?;
        let command = Command::Connection {
            listener: listener.clone(),
            stream,
            peer,
        };
        match self.peers[least].send(command) {
            Ok(()) => None,
            Err(SendError(Command::Connection { stream, .. })) => TcpStream::from_std(stream).ok(),
            Err(_) => None,
        }
    }
}

/// Route configurations by name (RDS).
#[derive(Debug, Default)]
pub struct Routes {
    by_name: RefCell<HashMap<Arc<str>, Arc<RouteConfiguration>, foldhash::fast::RandomState>>,
}

impl Routes {
    /// The routes of this name as they are now. A request asks once and keeps the answer.
    pub fn find(&self, name: &str) -> Option<Arc<RouteConfiguration>> {
        self.by_name.borrow().get(name).cloned()
    }

    pub(crate) fn upsert(&self, routes: Arc<RouteConfiguration>) {
        self.by_name
            .borrow_mut()
            .insert(routes.name.clone(), routes);
    }

    pub(crate) fn remove(&self, name: &str) {
        self.by_name.borrow_mut().remove(name);
    }
}
