//! The BPF file system, which programs of mode EBPF mount where it is missing.
//!
//! Tests of `outrigger-intercept` and `outrigger-cni` take this file by its path.

use std::fs;

use nix::{
    mount::{MntFlags, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Unmounts it when dropped, if it was not mounted before and nobody keeps anything there.
#[derive(Debug)]
pub struct Restore {
    mounted: bool,
}

impl Restore {
    /// Looks how it is now.
    pub fn later() -> Restore {
        Restore { mounted: mounted() }
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if self.mounted || !mounted() {
            return;
        }
        // Another test's pods have folders there.
        let _ = fs::remove_dir(format!("{PATH}/outrigger"));
        // The kernel has two files of its own there.
        let kept = |e: fs::DirEntry| !e.file_name().to_string_lossy().ends_with(".debug");
        if fs::read_dir(PATH).is_ok_and(|list| !list.flatten().any(kept))
            && let Err(e) = umount2(PATH, MntFlags::empty())
        {
            println!("{PATH} stays mounted: {e}");
        }
    }
}

fn mounted() -> bool {
    statfs(PATH).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

const PATH: &str = "/sys/fs/bpf";
