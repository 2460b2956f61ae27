//! Draining: how a connection learns that its listener or chain goes away.
//!
//! A chain has a [`Drainer`], its connections hold the [`Drain`] of it. Draining begins, goes on for the drain time, and
//! ends with the order to close. HTTP connections answer by `Connection: close` and GOAWAY, either at once or, with
//! Envoy's gradual strategy, each at its own moment within the drain time. Before the process ends, all say it at once,
//! and connections at rest close as well.

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use super::random::Random;

/// How the end of connections is spread (`--drain-strategy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DrainStrategy {
    /// Over the drain time.
    #[default]
    Gradual,
    /// All at once.
    Immediate,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Open,
    Draining { since: Instant, over: Duration },
    Ending,
    Closed,
}

/// The side that says when.
#[derive(Debug)]
pub struct Drainer(watch::Sender<Phase>);

/// The side of a connection.
#[derive(Clone, Debug)]
pub struct Drain {
    phase: watch::Receiver<Phase>,
    /// It was open when the connection began: until something is said it is, and nobody has to look.
    from_open: bool,
}

impl Default for Drainer {
    fn default() -> Self {
        Self(watch::Sender::new(Phase::Open))
    }
}

impl Drainer {
    /// What a connection holds.
    pub fn drain(&self) -> Drain {
        Drain::new(self.0.subscribe())
    }

    /// Begins to drain; a second call changes nothing.
    pub fn begin(&self, over: Duration, strategy: DrainStrategy) {
        self.0.send_if_modified(|phase| {
            let open = *phase == Phase::Open;
            if open {
                let over = if strategy == DrainStrategy::Immediate {
                    Duration::ZERO
                } else {
                    over
                };
                *phase = Phase::Draining {
                    since: Instant::now(),
                    over,
                };
            }
            open
        });
    }

    /// The process is about to end: every response is its connection's last, and who says nothing is not waited for.
    pub fn end(&self) {
        self.0.send_if_modified(|phase| {
            let ends = *phase != Phase::Closed;
            if ends {
                *phase = Phase::Ending;
            }
            ends
        });
    }

    /// Orders every connection to close.
    pub fn close(&self) {
        self.0.send_replace(Phase::Closed);
    }

    /// How many connections (and copies of their [`Drain`]) are left.
    pub fn held(&self) -> usize {
        self.0.receiver_count()
    }

    /// Completes when none is left.
    pub async fn released(&self) {
        self.0.closed().await;
    }
}

impl Drain {
    /// A drain that never begins, for connections without a listener.
    pub fn never() -> Self {
        let (sender, receiver) = watch::channel(Phase::Open);
        drop(sender);
        Self::new(receiver)
    }

    fn new(phase: watch::Receiver<Phase>) -> Self {
        let from_open = *phase.borrow() == Phase::Open;
        Self { phase, from_open }
    }

    /// The phase. While nothing was said since the connection began it takes no lock.
    fn phase(&self) -> Phase {
        match self.from_open && matches!(self.phase.has_changed(), Ok(false)) {
            true => Phase::Open,
            false => *self.phase.borrow(),
        }
    }

    /// Whether draining has begun.
    pub fn begun(&self) -> bool {
        self.phase() != Phase::Open
    }

    /// Whether a connection that could end now should: asked once for each response. While a gradual drain goes on the
    /// answer is drawn by lot, so that clients do not come back all at once.
    pub fn should_close(&self, random: &Random) -> bool {
        match self.phase() {
            Phase::Open => false,
            Phase::Ending | Phase::Closed => true,
            Phase::Draining { since, over } => now_by_lot(since.elapsed(), over, random),
        }
    }

    /// Completes when draining begins. Can be dropped at any time.
    pub async fn begin(&self) {
        let mut receiver = self.phase.clone();
        // Without a drainer nothing ever drains.
        if receiver
            .wait_for(|phase| *phase != Phase::Open)
            .await
            .is_err()
        {
            std::future::pending().await
        }
    }

    /// Completes when the connection has to close. Can be dropped at any time.
    pub async fn closed(&self) {
        let mut receiver = self.phase.clone();
        if receiver
            .wait_for(|phase| *phase == Phase::Closed)
            .await
            .is_err()
        {
            std::future::pending().await
        }
    }

    /// Completes when the connection has to close, and where the process ends after this long. For who waits for a
    /// connection's first words. Can be dropped at any time.
    pub async fn over(&self, patience: Duration) {
        let mut receiver = self.phase.clone();
        let ends = |phase: &Phase| matches!(phase, Phase::Ending | Phase::Closed);
        if receiver.wait_for(ends).await.is_err() {
            std::future::pending().await
        }
        // Either way it is over.
        let _ = timeout(patience, self.closed()).await;
    }

    /// Whether anything was said of draining since the connection began. Takes no lock.
    pub fn has_moved(&self) -> bool {
        self.phase.has_changed().unwrap_or(false)
    }

    /// Whether the process is about to end, so that a connection at rest should close.
    pub fn is_ending(&self) -> bool {
        matches!(self.phase(), Phase::Ending | Phase::Closed)
    }

    /// Whether the connection has to close.
    pub fn is_closed(&self) -> bool {
        self.phase() == Phase::Closed
    }
}

/// A connection's share of the drain time is uniform: after half of it half of the connections have ended.
fn now_by_lot(elapsed: Duration, over: Duration, random: &Random) -> bool {
    elapsed >= over || random.below(over.as_millis() as u64) < elapsed.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_begins_while_its_chain_drains_knows() {
        let drainer = Drainer::default();
        let before = drainer.drain();
        assert!(!before.begun());
        drainer.begin(Duration::from_secs(10), DrainStrategy::Immediate);
        let after = drainer.drain();
        assert!(before.begun() && after.begun() && after.clone().begun());
        assert!(!after.is_closed());
        drainer.close();
        assert!(before.is_closed() && after.is_closed());
    }

    #[test]
    fn a_gradual_drain_ends_some_early_and_all_in_time() {
        let (random, over) = (Random::seeded(7), Duration::from_secs(10));
        let ended = |elapsed| {
            (0..1000)
                .filter(|_| now_by_lot(Duration::from_secs(elapsed), over, &random))
                .count()
        };
        assert_eq!(ended(0), 0);
        assert!((400..600).contains(&ended(5)));
        assert_eq!(ended(10), 1000);
    }

    #[tokio::test]
    async fn an_immediate_drain_ends_all() {
        let drainer = Drainer::default();
        let drain = drainer.drain();
        assert!(!drain.begun() && !drain.should_close(&Random::seeded(1)));
        drainer.begin(Duration::from_secs(45), DrainStrategy::Immediate);
        drain.begin().await;
        assert!(drain.should_close(&Random::seeded(1)) && !drain.is_closed());
        drainer.close();
        drain.closed().await;
        assert!(!Drain::never().begun());
    }

    #[tokio::test]
    async fn the_end_of_the_process_makes_a_gradual_drain_short() {
        let (drainer, patience) = (Drainer::default(), Duration::from_millis(20));
        let drain = drainer.drain();
        drainer.begin(Duration::from_secs(600), DrainStrategy::Gradual);
        assert!(drain.begun() && !drain.is_ending());
        assert!(!drain.should_close(&Random::seeded(1)));
        let begun = Instant::now();
        drainer.end();
        assert!(drain.is_ending() && drain.should_close(&Random::seeded(1)));
        drain.over(patience).await;
        assert!(begun.elapsed() >= patience && !drain.is_closed());
        drainer.close();
        drainer.end();
        drain.over(patience).await;
        assert!(drain.is_closed());
    }
}
