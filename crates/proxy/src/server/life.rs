//! Where the process stands, how it drains, and its end.

use std::{rc::Rc, sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::task::spawn_local;

use super::{Server, State};
use crate::{
    plan::listener::TrafficDirection,
    worker::{Command, WorkerHandle, drain::DrainStrategy},
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
            tokio::time::sleep(over).await;
            if let Some(server) = weak.upgrade() {
                server.stop_accepting(inbound_only);
            }
        });
    }

    /// Begins to drain at once, whatever the strategy; for tests and for the end of the process.
    pub fn drain_now(&self) {
        self.tell_workers(|| Command::Drain {
            inbound_only: false,
            over: Duration::ZERO,
            strategy: DrainStrategy::Immediate,
        });
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

impl Drop for Server {
    fn drop(&mut self) {
        self.shut_down();
    }
}
