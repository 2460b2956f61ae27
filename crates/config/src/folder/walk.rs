//! The files of a folder, by path, with what tells whether they changed.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{Problem, Severity};

/// What changes when a file's content does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    /// When the content was read; not part of the comparison.
    pub(super) read_at: SystemTime,
}

impl PartialEq for Stamp {
    fn eq(&self, other: &Self) -> bool {
        let key = |s: &Self| (s.device, s.inode, s.len, s.modified, s.changed);
        key(self) == key(other)
    }
}

impl Stamp {
    /// Whether the file was written so shortly before `read_at` that another write could have left the same times.
    pub(super) fn is_recent(&self, read_at: SystemTime) -> bool {
        self.changed_at() + CLOCK_STEP > read_at
    }

    /// How long ago the file was last written.
    pub(super) fn age(&self) -> Duration {
        SystemTime::now()
            .duration_since(self.changed_at())
            .unwrap_or_default()
    }

    fn changed_at(&self) -> SystemTime {
        let seconds = Duration::from_secs(u64::try_from(self.changed.0).unwrap_or(0));
        SystemTime::UNIX_EPOCH
            + seconds
            + Duration::from_nanos(u64::try_from(self.changed.1).unwrap_or(0))
    }
}

/// Every configuration file below `root`, links followed, names that start with a dot left out (a mounted ConfigMap
/// keeps its versions in such folders and links to them).
pub(super) fn files(root: &Path) -> (BTreeMap<PathBuf, Stamp>, Vec<Problem>) {
    let (mut out, mut problems) = (BTreeMap::new(), Vec::new());
    let mut seen = HashSet::new();
    folder(root, &mut seen, &mut out, &mut problems);
    (out, problems)
}

fn folder(
    path: &Path,
    seen: &mut HashSet<(u64, u64)>,
    out: &mut BTreeMap<PathBuf, Stamp>,
    problems: &mut Vec<Problem>,
) {
    let listed = fs::metadata(path).and_then(|meta| Ok((meta, fs::read_dir(path)?)));
    let (meta, entries) = match listed {
        Ok(listed) => listed,
        Err(e) => {
            problems.push(unlisted(path, &e));
            return;
        }
    };
    // A link to a folder above would lead round for ever.
    if !seen.insert((meta.dev(), meta.ino())) {
        return;
    }
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(e) => {
                problems.push(unlisted(path, &e));
                continue;
            }
        };
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // Gone since it was listed, or a link that leads nowhere.
        let Ok(meta) = fs::metadata(&path) else {
            continue;
        };
        if meta.is_dir() {
            folder(&path, seen, out, problems);
        } else if meta.is_file() && is_configuration(&path) {
            let stamp = Stamp {
                device: meta.dev(),
                inode: meta.ino(),
                len: meta.len(),
                modified: (meta.mtime(), meta.mtime_nsec()),
                changed: (meta.ctime(), meta.ctime_nsec()),
                read_at: SystemTime::UNIX_EPOCH,
            };
            out.insert(path, stamp);
        }
    }
}

fn is_configuration(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}

fn unlisted(path: &Path, e: &io::Error) -> Problem {
    Problem {
        severity: Severity::Error,
        file: path.into(),
        line: 0,
        object: None,
        field: String::new(),
        message: format!("cannot be listed: {e}; what was read from it stays in force"),
    }
}

/// Above the step of the clock that file systems stamp with.
const CLOCK_STEP: Duration = Duration::from_millis(50);
