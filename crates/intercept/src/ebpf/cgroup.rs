//! The pod's control group: what the programs for its sockets are attached to.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::Error;

/// The pod's group in the cgroup2 hierarchy.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// Its folder.
    pub(crate) path: PathBuf,
    /// The kernel's number of it.
    pub(crate) id: u64,
}

impl Group {
    /// The group at `path` (`--ebpf-cgroup`), or where that is empty the one that this process is in.
    pub(crate) fn find(path: &str) -> Result<Group, Error> {
        let mount = mount()?;
        let path = match path {
            "" => own(&mount)?,
            path => PathBuf::from(path),
        };
        let fail = |why: String| Error::Ebpf(format!("cgroup {}: {why}", path.display()));
        let found = fs::metadata(&path).map_err(|e| fail(e.to_string()))?;
        let root = fs::metadata(&mount).map_err(|e| fail(e.to_string()))?;
        if found.dev() != root.dev() {
            return Err(fail(format!(
                "it is not below the cgroup2 mount {}",
                mount.display()
            )));
        }
        if found.ino() == root.ino() {
            return Err(fail(
                "programs there would act on every process of the machine; name the pod's own with --ebpf-cgroup".into(),
            ));
        }
        Ok(Group {
            id: found.ino(),
            path,
        })
    }
}

/// This process in the pod's group, whose sockets alone are captured; back where it was when dropped.
#[derive(Debug)]
pub(crate) struct Inside {
    /// A group of its own below the pod's, since one with controllers for its children takes no process; none where
    /// this process was there already.
    moved: Option<(PathBuf, PathBuf)>,
}

impl Inside {
    /// Moves this process to the group at `path` (`--ebpf-cgroup`).
    pub(crate) fn of(path: &str) -> Result<Inside, Error> {
        let group = Group::find(path)?;
        let before = own(&mount()?)?;
        if before.starts_with(&group.path) {
            return Ok(Inside { moved: None });
        }
        let below = group
            .path
            .join(format!("outrigger-validation-{}", std::process::id()));
        let fail = |why: std::io::Error| {
            Error::Ebpf(format!(
                "cgroup {}: this process cannot join it for the self-test: {why}",
                group.path.display()
            ))
        };
        fs::create_dir(&below).map_err(fail)?;
        if let Err(e) = fs::write(below.join("cgroup.procs"), "0") {
            let _ = fs::remove_dir(&below);
            return Err(fail(e));
        }
        Ok(Inside {
            moved: Some((before, below)),
        })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Some((before, below)) = &self.moved {
            // Without a way back the process ends there, and its group with the pod's.
            let _ = fs::write(before.join("cgroup.procs"), "0");
            let _ = fs::remove_dir(below);
        }
    }
}

/// The folder of the group with that number; none where it is gone.
pub(super) fn numbered(id: u64) -> Option<PathBuf> {
    let mut found = None;
    visit(&mount().ok()?, &mut |path, number| {
        if number == id {
            found = Some(path);
        }
    });
    found
}

/// The numbers of all groups; none where they cannot be seen.
pub(super) fn numbers() -> Option<HashSet<u64>> {
    let root = mount().ok()?;
    // There may be none below the root, so that one counts: it is always there.
    let mut out = HashSet::from([fs::metadata(&root).ok()?.ino()]);
    fs::read_dir(&root).ok()?;
    visit(&root, &mut |_, number| {
        out.insert(number);
    });
    Some(out)
}

/// Shows every group below `root` with its number.
fn visit(root: &Path, show: &mut dyn FnMut(PathBuf, u64)) {
    let mut left = vec![root.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if let Ok(metadata) = entry.metadata()
                && metadata.is_dir()
            {
                left.push(entry.path());
                show(entry.path(), metadata.ino());
            }
        }
    }
}

/// Where cgroup2 is mounted; beside version 1 (a hybrid) counts.
pub fn mount() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounted(&mounts).ok_or_else(|| {
        Error::Ebpf(
            "no cgroup2 is mounted here: mode EBPF attaches to the pod's cgroup (mount -t cgroup2)"
                .into(),
        )
    })
}

fn mounted(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (path, kind) = (words.nth(1)?, words.next()?);
        (kind == "cgroup2").then(|| path.into())
    })
}

fn own(mount: &Path) -> Result<PathBuf, Error> {
    let text = fs::read_to_string("/proc/thread-self/cgroup").unwrap_or_default();
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| Error::Ebpf("/proc/thread-self/cgroup names no group of cgroup2".into()))?;
    Ok(mount.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_mount_counts() {
        let text = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mounted(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mounted("proc /proc proc rw 0 0\n"), None);
    }
}
