//! A pod's folder in cgroup2: what eBPF programs of the capture are attached to.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::sleep;

/// Makes the folder; none where this machine has no cgroup2 that can be written to. A mesh has a folder of its own, named
/// after where it keeps its state, so that one that was killed finds its pods' again.
pub(crate) fn make(state: &Path, pod: &str) -> Option<PathBuf> {
    let mut hash = DefaultHasher::new();
    state.hash(&mut hash);
    let mesh = format!("outrigger-local-{:016x}", hash.finish());
    let path = intercept::ebpf::cgroup_mount().ok()?.join(mesh).join(pod);
    fs::create_dir_all(&path).ok().map(|()| path)
}

/// Removes the folder once the last process has left it, the mesh's with its last pod, and programs that were attached.
pub(crate) async fn remove(path: &Path) {
    for _ in 0..50 {
        if fs::remove_dir(path).is_ok() {
            break;
        }
        sleep(Duration::from_millis(20)).await;
    }
    if let Some(mesh) = path.parent() {
        // Refused while it holds other pods.
        let _ = fs::remove_dir(mesh);
    }
    intercept::ebpf::sweep();
}
