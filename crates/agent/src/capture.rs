//! Whether the pod's traffic really comes to the proxy, looked at as long as the pod lives.
//!
//! Three looks, every two seconds. A call of the proxy's own user to this pod must come back in at the inbound port:
//! every pod can make it, and it fails when rules were never written, or were flushed. Where the agent may read rules
//! (NET_ADMIN, which TPROXY has), each rule that is inserted, deleted or moved after the start is named, and taken back
//! with `OUTRIGGER_CAPTURE_GUARD=repair`. And the table of connection tracking, without room in which REDIRECT cannot
//! translate: new connections are dropped.

use std::{
    env, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use intercept::guard::{Finding, Guard, PERIOD};
use parking_lot::RwLock;
use tracing::{info, warn};

use crate::{
    AgentError,
    settings::{Role, Settings},
};

/// What is known of the capture.
#[derive(Debug, Default)]
pub struct Capture {
    checked: AtomicBool,
    /// Why nothing comes to the proxy.
    missing: RwLock<Option<String>>,
    /// Rules that are not as they were.
    changed: RwLock<Vec<Finding>>,
    changes: AtomicU64,
    repairs: AtomicU64,
    entries: AtomicU64,
    most_entries: AtomicU64,
    dropped: AtomicU64,
}

impl Capture {
    /// Begins to look, where the injector says that this pod is captured (`ISTIO_META_INTERCEPTION_MODE`).
    pub fn start(settings: &Settings) -> Result<Option<Arc<Capture>>, AgentError> {
        let mode = env::var("ISTIO_META_INTERCEPTION_MODE").unwrap_or_default();
        let captured = matches!(mode.as_str(), "REDIRECT" | "TPROXY" | "EBPF");
        if settings.role != Role::Sidecar || !captured {
            return Ok(None);
        }
        let repair = match env::var(GUARD).as_deref() {
            Ok("off") => return Ok(None),
            Ok("repair") => true,
            Ok("report" | "") | Err(_) => false,
            Ok(other) => {
                return Err(AgentError::Config(format!(
                    "environment variable {GUARD}: {other:?} is not off, report or repair"
                )));
            }
        };
        Capture::of(settings.addresses[0], repair).map(Some)
    }

    /// Looks after the pod with that address, in the network namespace of the calling thread.
    pub fn of(pod: IpAddr, repair: bool) -> Result<Arc<Capture>, AgentError> {
        let capture = Arc::new(Capture::default());
        let watched = capture.clone();
        thread::Builder::new()
            .name("capture".into())
            .spawn(move || watched.watch(pod, repair))
            .map_err(|source| AgentError::Listen {
                address: "capture".into(),
                source,
            })?;
        Ok(capture)
    }

    /// Why the pod must not be called ready: nothing has been proven yet, nothing is captured, or rules are gone.
    pub fn not_ready(&self) -> Option<String> {
        if let Some(why) = &*self.missing.read() {
            return Some(why.clone());
        }
        if !self.checked.load(Ordering::Relaxed) {
            return Some("the capture has not been proven yet".into());
        }
        let changed = self.changed.read();
        let worst = changed.iter().find(|f| f.kind != "inserted")?;
        Some(format!("the interception has changed: {worst}"))
    }

    /// What readiness tells beside its answer: rules of others that came in between.
    pub fn detail(&self) -> String {
        let changed = self.changed.read();
        changed.iter().map(|f| format!("{f}\n")).collect()
    }

    /// Figures for the scrape.
    pub fn text(&self) -> String {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let working = u64::from(self.not_ready().is_none());
        let differing = self.changed.read().len();
        let mut out = format!(
            "# TYPE istio_agent_capture_working gauge\nistio_agent_capture_working {working}\n\
             # TYPE istio_agent_capture_rules_changed gauge\nistio_agent_capture_rules_changed {differing}\n"
        );
        for (name, kind, value) in [
            ("capture_rule_changes_total", "counter", &self.changes),
            ("capture_repairs_total", "counter", &self.repairs),
            ("conntrack_entries", "gauge", &self.entries),
            ("conntrack_max_entries", "gauge", &self.most_entries),
            ("conntrack_dropped_total", "counter", &self.dropped),
        ] {
            out.push_str(&format!(
                "# TYPE istio_agent_{name} {kind}\nistio_agent_{name} {}\n",
                read(value)
            ));
        }
        out
    }

    fn watch(&self, pod: IpAddr, repair: bool) {
        let mut guard = None;
        let mut unguarded = false;
        let mut tracking = Tracking::default();
        loop {
            self.call(pod);
            if guard.is_none() && !unguarded && self.checked.load(Ordering::Relaxed) {
                match Guard::start() {
                    Ok(started) => {
                        info!("capture: rules are guarded");
                        guard = Some(started);
                    }
                    Err(e) => {
                        info!("capture: single rules are not guarded: {e}");
                        unguarded = true;
                    }
                }
            }
            if let Some(guard) = &mut guard {
                self.compare(guard, repair);
            }
            if let Some(dropped) = tracking.look(&self.entries, &self.most_entries) {
                self.dropped.fetch_add(dropped, Ordering::Relaxed);
                warn!(
                    "capture: connection tracking has no room ({} of {} entries), {dropped} packets were dropped: new \
                     connections through REDIRECT fail; raise net.netfilter.nf_conntrack_max on the node",
                    self.entries.load(Ordering::Relaxed),
                    self.most_entries.load(Ordering::Relaxed)
                );
            }
            // Until the first proof a pod waits for it to be called ready.
            thread::sleep(match self.checked.load(Ordering::Relaxed) {
                true => PERIOD,
                false => FIRST,
            });
        }
    }

    /// Makes the call and notes what it shows.
    fn call(&self, pod: IpAddr) {
        let outcome = own_call(pod);
        let mut missing = self.missing.write();
        match outcome {
            Ok(true) => {
                if missing.take().is_some() || !self.checked.swap(true, Ordering::Relaxed) {
                    info!("capture: the proxy's calls to this pod come to its inbound port");
                }
            }
            // The proxy is not there yet, or not any more: nothing can be told.
            Ok(false) => {}
            Err(why) => {
                if missing.is_none() {
                    warn!("capture: {why}");
                }
                *missing = Some(why);
            }
        }
    }

    fn compare(&self, guard: &mut Guard, repair: bool) {
        let found = match guard.look() {
            Ok(found) => found.to_vec(),
            Err(e) => return warn!("capture: rules cannot be read: {e}"),
        };
        let mut changed = self.changed.write();
        for finding in found.iter().filter(|f| !changed.contains(f)) {
            self.changes.fetch_add(1, Ordering::Relaxed);
            warn!("capture: {finding}");
        }
        if found.is_empty() && !changed.is_empty() {
            info!("capture: everything is again as it was");
        }
        *changed = found;
        if repair && !changed.is_empty() {
            match guard.repair() {
                Ok(()) => {
                    self.repairs.fetch_add(1, Ordering::Relaxed);
                    info!("capture: repaired, what was there at the start is there again");
                    changed.clear();
                }
                Err(e) => warn!("capture: cannot repair: {e}"),
            }
        }
    }
}

/// Whether a call of this process to its own pod is led to the inbound port; `Ok(false)` where the proxy does not
/// listen, so that nothing can be told. Two addresses are tried: the rules may exempt the first as loopback.
fn own_call(pod: IpAddr) -> Result<bool, String> {
    let (passthrough, local): (IpAddr, IpAddr) = match pod {
        IpAddr::V4(_) => (
            Ipv4Addr::new(127, 0, 0, 6).into(),
            Ipv4Addr::LOCALHOST.into(),
        ),
        IpAddr::V6(_) => (
            Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(),
            Ipv6Addr::LOCALHOST.into(),
        ),
    };
    for ip in [passthrough, pod] {
        if reaches(SocketAddr::new(ip, PROBE_PORT)) {
            return Ok(true);
        }
    }
    if !reaches(SocketAddr::new(local, INBOUND_PORT)) {
        return Ok(false);
    }
    Err(format!(
        "this pod's traffic is not captured: a call from the proxy's user to {passthrough} does not come to port \
         {INBOUND_PORT}; are the rules of istio-iptables (or of the CNI plug-in) in this pod? `outrigger intercept \
         verify` and `explain` tell more"
    ))
}

fn reaches(to: SocketAddr) -> bool {
    let connect = || -> io::Result<()> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(1))?;
        // Ended by a reset: nothing of it stays in TIME_WAIT here.
        nix::sys::socket::setsockopt(
            &stream,
            nix::sys::socket::sockopt::Linger,
            &libc::linger {
                l_onoff: 1,
                l_linger: 0,
            },
        )?;
        Ok(())
    };
    connect().is_ok()
}

/// Packets that connection tracking had no room for.
#[derive(Default)]
struct Tracking {
    dropped: Option<u64>,
}

impl Tracking {
    /// How many more were dropped since the last look, if any.
    fn look(&mut self, entries: &AtomicU64, most: &AtomicU64) -> Option<u64> {
        for (file, figure) in [("nf_conntrack_count", entries), ("nf_conntrack_max", most)] {
            let text = fs::read_to_string(format!("/proc/sys/net/netfilter/{file}")).ok()?;
            figure.store(text.trim().parse().unwrap_or(0), Ordering::Relaxed);
        }
        let now = dropped(&fs::read_to_string("/proc/thread-self/net/stat/nf_conntrack").ok()?)?;
        let before = self.dropped.replace(now).unwrap_or(now);
        Some(now.saturating_sub(before)).filter(|n| *n > 0)
    }
}

/// The sum of the column `drop`, hexadecimal, a line a core.
fn dropped(text: &str) -> Option<u64> {
    let mut lines = text.lines();
    let at = lines
        .next()?
        .split_whitespace()
        .position(|name| name == "drop")?;
    let value = |line: &str| {
        let word = line.split_whitespace().nth(at)?;
        u64::from_str_radix(word, 16).ok()
    };
    Some(lines.filter_map(value).sum())
}

const GUARD: &str = "OUTRIGGER_CAPTURE_GUARD";
/// Time between two looks until the first proof.
const FIRST: Duration = Duration::from_millis(50);
/// As the self-test of istio-iptables.
const PROBE_PORT: u16 = 15002;
const INBOUND_PORT: u16 = 15006;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_summed_over_cores() {
        let text = "entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop\n\
                    00000003  0 0 0 0 0 0 0 0 0 0000000a 0\n00000003  0 0 0 0 0 0 0 0 0 00000001 0\n";
        assert_eq!(dropped(text), Some(11));
        assert_eq!(dropped("nothing\n"), None);
    }

    #[test]
    fn readiness_names_what_is_wrong() {
        let capture = Capture::default();
        assert!(capture.not_ready().unwrap().contains("not been proven"));
        capture.checked.store(true, Ordering::Relaxed);
        assert_eq!(capture.not_ready(), None);
        let finding = |kind| Finding {
            subject: "rule",
            kind,
            what: "iptables-nft, table nat, chain OUTPUT, rule 1: -j ACCEPT".into(),
        };
        // Somebody else's rule is told; a rule of ours that is gone keeps calls away.
        capture.changed.write().push(finding("inserted"));
        assert_eq!(capture.not_ready(), None);
        assert!(
            capture
                .detail()
                .contains("rule inserted: iptables-nft, table nat")
        );
        capture.changed.write().push(finding("deleted"));
        assert!(capture.not_ready().unwrap().contains("rule 1: -j ACCEPT"));
        assert!(capture.text().contains("istio_agent_capture_working 0\n"));
    }
}
