//! The pod's control group, which programs of mode EBPF are attached to.
//!
//! The CNI hands over no cgroup. Kubelet makes the pod's before it asks for the sandbox, under a name that holds the
//! pod's uid: `pod<uid>` with its cgroupfs driver, `kubepods-…-pod<uid>.slice` with systemd, with `_` for the uid's `-`
//! there. Which folders lie above is kubelet's choice (quality of service, `--cgroup-root`, a node in a container), so
//! the name is looked for.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The folder of the pod with that uid below `root`, breadth first; none where there is none.
pub(crate) fn of_pod(root: &Path, uid: &str) -> Option<PathBuf> {
    // It becomes part of a comparison alone, but an empty one would match anything.
    if uid.is_empty() {
        return None;
    }
    let plain = format!("pod{uid}");
    let slice = format!("-pod{}.slice", uid.replace('-', "_"));
    let mut level = vec![root.to_owned()];
    for _ in 0..DEPTH {
        let mut below = Vec::new();
        for folder in &level {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if !entry.file_type().is_ok_and(|t| t.is_dir()) {
                    continue;
                }
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if name == plain || name.ends_with(&slice) {
                    return Some(entry.path());
                }
                // Another pod's has only containers in it.
                let other = name.starts_with("pod") || name.contains("-pod");
                if !other {
                    below.push(entry.path());
                }
            }
        }
        level = below;
    }
    None
}

/// `kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/…-pod<uid>.slice` in a node's own cgroup of a
/// container engine is the deepest that is known.
const DEPTH: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_drivers_of_kubelet_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(&path).unwrap();
            path
        };
        make("system.slice/containerd.service");
        make("kubepods/podaaaa-1/container");
        let cgroupfs = make("kubepods/burstable/podbbbb-2");
        let slice = "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice";
        let systemd = make(&format!(
            "{slice}/kubelet-kubepods-besteffort-podcccc_3.slice"
        ));
        assert_eq!(of_pod(dir.path(), "bbbb-2"), Some(cgroupfs));
        assert_eq!(of_pod(dir.path(), "cccc-3"), Some(systemd));
        assert_eq!(of_pod(dir.path(), "dddd-4"), None);
        assert_eq!(of_pod(dir.path(), ""), None);
    }
}
