//! Where the process stands, how it drains, and its end.

use std::{rc::Rc, sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::{
    task::spawn_local,
    time::{sleep, timeout},
};

use super::{Server, State};
use crate::{
    plan::listener::TrafficDirection,
    worker::{Command, WorkerHandle},
};

impl Server {
    /// Where the process stands.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Completes when the process is in this state.
    pub async fn reached(&self, state: State) {
        // The sender lives as long as self.
        let _ = self.state.subscribe().wait_for(|now| *now == state).await;
    }

    /// Goes on to another state.
    pub fn set_state(&self, state: State) {
        self.state.send_replace(state);
        self.stats.gauge("server.state").set(state as i64);
        self.stats
            .gauge("server.live")
            .set(i64::from(state == State::Live));
        if state == State::Live {
            self.stats.gauge("listener_manager.workers_started").set(1);
            self.stats
                .histogram("server.initialization_time_ms")
                .record(self.started.elapsed().as_millis() as u64);
        }
    }

    /// `/healthcheck/fail` and `/healthcheck/ok`.
    pub fn fail_health_check(&self, fail: bool) {
        self.shared.health_failed.store(fail, Relaxed);
    }

    /// Drains listeners (`/drain_listeners`): gracefully means that sockets go on accepting until the drain time is over,
    /// and with `stay` after it as well; else they close at once. A graceful drain that has begun is not begun again.
    pub fn drain_listeners(self: &Rc<Self>, inbound_only: bool, graceful: bool, stay: bool) {
        if graceful && self.draining.replace(true) {
            return;
        }
        let (over, strategy) = (self.options.drain_time, self.options.drain_strategy);
        self.tell_workers(|| Command::Drain {
            inbound_only,
            over,
            strategy,
        });
        if !graceful {
            self.stop_accepting(inbound_only);
            return;
        }
        if stay {
            return;
        }
        let weak = Rc::downgrade(self);
        spawn_local(async move {
            sleep(over).await;
            if let Some(server) = weak.upgrade() {
                server.stop_accepting(inbound_only);
            }
        });
    }

    /// Drains for the end of the process: completes when no connection is left, after the drain time at the latest.
    ///
    /// Whatever the strategy says, every response is the last of its connection from now on, every HTTP/2 client gets its
    /// GOAWAY, and connections at rest close after a connection manager's `drain_timeout`. Whoever comes is still
    /// served, since others learn only by and by that this process ends; readiness and health checks say so at once.
    pub async fn drain_to_the_end(&self) {
        self.draining.set(true);
        self.set_state(State::Draining);
        self.fail_health_check(true);
        self.tell_workers(|| Command::End);
        let all_gone = async {
            self.idle().await;
            // Who was let in before the sockets closed is served.
            self.stop_accepting(false);
            self.idle().await;
        };
        if timeout(self.options.drain_time, all_gone).await.is_err() {
            let left = self.connections();
            tracing::warn!("the drain time is over: {left} connections are cut");
        }
    }

    /// Completes when no downstream connection is open.
    async fn idle(&self) {
        loop {
            self.settled().await;
            if self.connections() == 0 {
                return;
            }
            sleep(LOOK).await;
        }
    }

    /// Downstream connections of all listeners.
    pub(super) fn connections(&self) -> u64 {
        let open = self.shared.workers.iter();
        open.map(|open| open.load(Relaxed)).sum()
    }

    fn stop_accepting(&self, inbound_only: bool) {
        self.tell_workers(|| Command::StopAccepting { inbound_only });
        // The main thread's copies keep the port open otherwise.
        for status in self.listeners.borrow_mut().values_mut() {
            if !inbound_only || status.plan.traffic_direction == TrafficDirection::Inbound {
                status.sockets = None;
            }
        }
    }

    fn tell_workers(&self, command: impl Fn() -> Command) {
        self.workers
            .borrow()
            .iter()
            .for_each(|worker| worker.send(command()));
    }

    /// Asks the process to end (`/quitquitquit`, signals).
    pub fn quit(&self) {
        self.stop.send_replace(true);
    }

    /// Completes when [`Server::quit`] was called.
    pub async fn quitting(&self) {
        // The sender lives as long as self.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends the workers: connections close, and what they logged is written and delivered. Takes a second at most, less
    /// where the drain time is less.
    pub fn shut_down(&self) {
        if self.workers.borrow().is_empty() {
            return;
        }
        // All are told before one is waited for.
        self.tell_workers(|| Command::Stop);
        self.workers
            .borrow_mut()
            .iter_mut()
            .for_each(WorkerHandle::join);
        self.workers.borrow_mut().clear();
        crate::access_log::settle();
    }
}

/// How often it is looked whether connections are left.
const LOOK: Duration = Duration::from_millis(20);

impl Drop for Server {
    fn drop(&mut self) {
        self.shut_down();
    }
}
