//! Overload: the main thread measures, workers give up what the configuration says.
//!
//! A worker asks [`Overload`] where load can be refused. The answer is one number that the main thread wrote last, so asking
//! costs a load of a word that hardly ever changes.

use std::{
    fs, io,
    path::Path,
    rc::Weak,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    plan::overload::{Action, Monitor, MonitorKind, OverloadManager, ShedPoint, Trigger},
    server::Server,
    worker::{Random, Worker},
};

/// How much of each action and each point applies, in parts per million.
#[derive(Debug)]
pub struct Overload {
    actions: [AtomicU32; Action::ALL.len()],
    points: [AtomicU32; ShedPoint::ALL.len()],
    accepting: watch::Sender<bool>,
}

impl Default for Overload {
    fn default() -> Self {
        Self {
            actions: Default::default(),
            points: Default::default(),
            accepting: watch::Sender::new(true),
        }
    }
}

impl Overload {
    /// Whether an action applies to what is at hand. Where it applies in part, a lot is drawn.
    pub(crate) fn applies(&self, action: Action, random: &Random) -> bool {
        drawn(&self.actions[action as usize], random)
    }

    /// Whether load is refused here; counts it.
    pub(crate) fn sheds(&self, point: ShedPoint, worker: &Worker) -> bool {
        let shed = drawn(&self.points[point as usize], &worker.random);
        if shed {
            // Found by name, as it is rare.
            let name = format!("overload.{}.shed_load_count", point.name());
            worker.stats.counter(&name).inc();
        }
        shed
    }

    /// Tells whether connections may be accepted.
    pub(crate) fn accepting(&self) -> watch::Receiver<bool> {
        self.accepting.subscribe()
    }
}

fn drawn(level: &AtomicU32, random: &Random) -> bool {
    match level.load(Relaxed) {
        0 => false,
        level => level >= FULL || random.below(FULL.into()) < level.into(),
    }
}

/// Measures as long as the server lives.
pub(crate) async fn watch(plan: Arc<OverloadManager>, server: Weak<Server>) {
    let mut ticks = interval(plan.refresh_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut values = vec![0.0; plan.monitors.len()];
    let mut last = Instant::now();
    loop {
        ticks.tick().await;
        let Some(server) = server.upgrade() else {
            return;
        };
        let late = last.elapsed().saturating_sub(plan.refresh_interval);
        server
            .stats
            .histogram("overload.refresh_interval_delay")
            .record(late.as_millis() as u64);
        last = Instant::now();
        for (monitor, value) in plan.monitors.iter().zip(&mut values) {
            let scope = server.stats.scope(&format!("overload.{}.", monitor.name));
            match measure(monitor) {
                Ok(measured) => {
                    *value = measured;
                    scope.gauge("pressure").set((measured * 100.0) as i64);
                }
                // The last value counts on.
                Err(error) => {
                    tracing::warn!(monitor = &*monitor.name, %error, "cannot measure");
                    scope.counter("failed_updates").inc();
                }
            }
        }
        update(&plan, &values, &server);
    }
}

fn update(plan: &OverloadManager, values: &[f64], server: &Server) {
    let overload = &server.shared.overload;
    let level = |triggers: &[Trigger]| {
        let levels = triggers
            .iter()
            .map(|trigger| trigger.kind.level(values[trigger.monitor]));
        (levels.fold(0.0, f64::max) * f64::from(FULL)) as u32
    };
    for (action, triggers) in &plan.actions {
        let (name, level) = (action.name(), level(triggers));
        let before = overload.actions[*action as usize].swap(level, Relaxed);
        if (before == FULL) != (level == FULL) {
            tracing::warn!(
                action = name,
                active = level == FULL,
                "an overload action has changed"
            );
        }
        let scope = server.stats.scope(&format!("overload.{name}."));
        scope.gauge("active").set(i64::from(level == FULL));
        scope
            .gauge("scale_percent")
            .set(i64::from(level / (FULL / 100)));
        match action {
            Action::StopAcceptingConnections => {
                let accepting = level < FULL;
                overload
                    .accepting
                    .send_if_modified(|now| std::mem::replace(now, accepting) != accepting);
            }
            Action::ShrinkHeap if level == FULL => {
                scope.counter("shrink_count").inc();
                shrink_heap();
            }
            _ => {}
        }
    }
    for (point, triggers) in &plan.points {
        let level = level(triggers);
        overload.points[*point as usize].store(level, Relaxed);
        let name = format!("overload.{}.scale_percent", point.name());
        server
            .stats
            .gauge(&name)
            .set(i64::from(level / (FULL / 100)));
    }
}

/// The allocator collects what is free when a thread's heap ends.
fn shrink_heap() {
    // Without the thread the memory stays, which is all.
    let _ = std::thread::Builder::new().spawn(|| drop(std::hint::black_box(vec![0u8; 1 << 20])));
}

/// A monitor's value: 0 is nothing, 1 is all there is.
fn measure(monitor: &Monitor) -> io::Result<f64> {
    match &monitor.kind {
        MonitorKind::FixedHeap(max) => Ok(resident()? as f64 / *max as f64),
        MonitorKind::CgroupMemory(max) => {
            let (used, limit) = cgroup_memory(Path::new("/sys/fs/cgroup"))?;
            let max = match (max, limit) {
                (Some(max), Some(limit)) => limit.min(*max),
                (Some(max), None) => *max,
                (None, Some(limit)) => limit,
                // No limit is no pressure.
                (None, None) => return Ok(0.0),
            };
            Ok(used as f64 / max as f64)
        }
        MonitorKind::Injected(path) => {
            let text = fs::read_to_string(path)?;
            let value: f64 = text
                .trim()
                .parse()
                .map_err(|_| invalid("it holds no number"))?;
            if (0.0..=1.0).contains(&value) {
                Ok(value)
            } else {
                Err(invalid("its number is not from 0 to 1"))
            }
        }
    }
}

/// Bytes of this process in memory.
fn resident() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/statm")?;
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    let pages = pages.ok_or_else(|| invalid("/proc/self/statm has no second number"))?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// What a cgroup uses, and its limit: version 2, else version 1.
fn cgroup_memory(root: &Path) -> io::Result<(u64, Option<u64>)> {
    let read = |name: &str| fs::read_to_string(root.join(name));
    let (used, limit) = match read("memory.current") {
        Ok(used) => (used, read("memory.max")?),
        Err(_) => (
            read("memory/memory.usage_in_bytes")?,
            read("memory/memory.limit_in_bytes")?,
        ),
    };
    let used = used
        .trim()
        .parse()
        .map_err(|_| invalid("the use is no number"))?;
    // `max` stands for none.
    Ok((used, limit.trim().parse().ok()))
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Of levels.
const FULL: u32 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_measured() {
        let monitor = |kind| Monitor {
            name: "m".into(),
            kind,
        };
        let used = resident().expect("proc is mounted");
        assert!(used > 100_000, "{used}");
        let value = measure(&monitor(MonitorKind::FixedHeap(used * 4))).expect("proc is mounted");
        assert!((0.1..1.0).contains(&value), "{value}");
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("memory.current"), "1000\n").expect("it is there");
        for (limit, found) in [("max\n", None), ("4000\n", Some(4000))] {
            fs::write(dir.path().join("memory.max"), limit).expect("it is there");
            let memory = cgroup_memory(dir.path()).expect("both files are there");
            assert_eq!(memory, (1000, found));
        }
    }

    #[test]
    fn a_part_is_drawn() {
        let random = Random::seeded(3);
        let hits = |level| {
            let level = AtomicU32::new(level);
            (0..1000).filter(|_| drawn(&level, &random)).count()
        };
        assert_eq!((hits(0), hits(FULL)), (0, 1000));
        assert!((200..300).contains(&hits(FULL / 4)));
    }
}
