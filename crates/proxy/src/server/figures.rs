//! What the process says of itself (`server.`), with Envoy's names, and what else is found out only when stats are read.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Server;
use crate::transport::Material;

/// Memory of the process in bytes, from the kernel's figures.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// Pages of its own that hold something.
    pub(crate) allocated: u64,
    /// What it has reserved for data.
    pub(crate) heap: u64,
    /// All that it holds in memory, files and shared pages included.
    pub(crate) physical: u64,
}

impl Memory {
    /// Reads the figures; 0 is one that the kernel does not tell.
    pub(crate) fn read() -> Memory {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let bytes = |key: &str| {
            let line = status
                .lines()
                .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
            let number = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
            number.unwrap_or(0) * 1024
        };
        Memory {
            allocated: bytes("RssAnon"),
            heap: bytes("VmData"),
            physical: bytes("VmRSS"),
        }
    }
}

impl Server {
    /// Tells what is only known when it is asked for; before stats are read.
    pub fn publish(&self) {
        self.clusters.borrow_mut().publish_breakers(&self.stats);
        self.publish_memberships();
        let memory = Memory::read();
        let connections = self.connections();
        let [listeners, chains] = self.shared.drains.count();
        for (name, value) in [
            ("total_listeners_draining", listeners),
            ("total_filter_chains_draining", chains),
        ] {
            self.stats
                .gauge(&format!("listener_manager.{name}"))
                .set(value as i64);
        }
        for (name, value) in [
            ("uptime", self.started.elapsed().as_secs()),
            ("memory_allocated", memory.allocated),
            ("memory_heap_size", memory.heap),
            ("memory_physical_size", memory.physical),
            ("total_connections", connections),
            ("days_until_first_cert_expiring", self.days_left()),
            // There is no process before this one whose connections go on.
            ("parent_connections", 0),
            ("hot_restart_epoch", u64::from(self.options.restart_epoch)),
        ] {
            self.stats
                .gauge(&format!("server.{name}"))
                .set(value as i64);
        }
    }

    /// Whole days until the first certificate in use is over; the largest number of 32 bits where there is none.
    fn days_left(&self) -> u64 {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_secs() as i64);
        let mut first = i64::from(u32::MAX);
        for (_, material) in self.tls_materials() {
            let mut look = |not_after: i64| first = first.min((not_after - now).max(0) / 86_400);
            match &*material {
                Material::Certificate(identity) => {
                    look(identity.leaf().not_after);
                    identity.chain().iter().for_each(|c| look(c.not_after));
                }
                Material::Text(_) => {}
                Material::Validation { authorities, .. } => {
                    let domains = authorities.domains.iter().map(|(_, trust)| trust);
                    for trust in domains.chain(&authorities.trust) {
                        trust.certificates().for_each(|c| look(c.not_after));
                    }
                }
            }
        }
        first as u64
    }
}
