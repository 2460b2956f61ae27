//! A folder of YAML and JSON files as the store of all objects.
//!
//! The folder is read as a whole and swapped as a whole. A file that goes bad changes nothing: of each object that can
//! no longer be read the last good version stays in force, and a [`Problem`] says so. [`Folder::reload`] is the plain,
//! synchronous form; [`Folder::watch`] runs it whenever something in the folder changes.

mod walk;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tracing::{error, info, warn};

use self::walk::Stamp;
pub use self::watch::Watch;
use crate::{AnyObject, ObjectKey, Problem, Severity, Snapshot, assemble::syntax, decode, yaml};

/// All objects of a folder, and what it takes to read only what changed.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    files: BTreeMap<PathBuf, FileState>,
    /// Problems with the folder itself: subfolders that cannot be listed.
    walk_problems: Vec<Problem>,
    snapshot: Arc<Snapshot>,
    problems: Arc<Vec<Problem>>,
}

/// A new state of the store.
#[derive(Debug, Clone)]
pub struct Update {
    /// All objects.
    pub snapshot: Arc<Snapshot>,
    /// The objects that differ from the snapshot before, derived ones included; empty when only problems changed.
    pub changed: BTreeSet<ObjectKey>,
    /// Everything that is wrong now.
    pub problems: Arc<Vec<Problem>>,
}

/// What a [`Folder::reload`] found.
#[derive(Debug)]
pub struct Reloaded {
    /// The new state, if it differs.
    pub update: Option<Update>,
    /// A file was just emptied, as some editors do before they write: it was left alone and should be looked at again
    /// after this time.
    pub again: Option<Duration>,
}

#[derive(Debug)]
struct FileState {
    stamp: Stamp,
    hash: u64,
    objects: Vec<AnyObject>,
    problems: Vec<Problem>,
}

impl Folder {
    /// Reads the folder; an error when it is missing or no folder. Bad files are no error but [`Folder::problems`].
    pub fn open(root: impl Into<PathBuf>) -> io::Result<Folder> {
        let root = root.into();
        if !fs::metadata(&root)?.is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::NotADirectory,
                format!("{} is not a folder", root.display()),
            ));
        }
        let mut folder = Folder {
            root,
            files: BTreeMap::new(),
            walk_problems: Vec::new(),
            snapshot: Arc::new(Snapshot::empty()),
            problems: Arc::default(),
        };
        folder.reload();
        Ok(folder)
    }

    /// All objects as they were last read.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// What is wrong in the files.
    pub fn problems(&self) -> &Arc<Vec<Problem>> {
        &self.problems
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Looks at every file and reads those that changed.
    pub fn reload(&mut self) -> Reloaded {
        let mut again = None;
        let (found, walk_problems) = walk::files(&self.root);
        // A folder that cannot be listed at all (unmounted, say) must not take every object away.
        if found.is_empty() && !walk_problems.is_empty() && !self.files.is_empty() {
            return self.finish(None, walk_problems, again);
        }
        let mut changed = false;
        let gone: Vec<PathBuf> = self
            .files
            .keys()
            .filter(|p| !found.contains_key(*p))
            .cloned()
            .collect();
        for path in gone {
            // What stands below a subfolder that could not be listed is not known to be gone.
            if !walk_problems.iter().any(|p| path.starts_with(&p.file)) {
                self.files.remove(&path);
                changed = true;
            }
        }
        for (path, stamp) in found {
            let old = self.files.get(&path);
            if old.is_some_and(|old| old.stamp == stamp && !stamp.is_recent(old.stamp.read_at)) {
                continue;
            }
            match self.read(&path, stamp, old) {
                Read::Same => {
                    if let Some(old) = self.files.get_mut(&path) {
                        old.stamp = stamp;
                    }
                }
                Read::Wait => again = Some(EMPTIED_WAIT),
                Read::New(state) => {
                    self.files.insert(path, state);
                    changed = true;
                }
            }
        }
        let assembled = changed.then(|| self.assemble());
        self.finish(assembled, walk_problems, again)
    }

    fn read(&self, path: &Path, stamp: Stamp, old: Option<&FileState>) -> Read {
        let file: Arc<Path> = path.into();
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Read::Wait,
            Err(e) => {
                let message = format!("cannot be read: {e}");
                let problem = Problem {
                    severity: Severity::Error,
                    file,
                    line: 0,
                    object: None,
                    field: String::new(),
                    message,
                };
                return Read::New(keep(stamp, 0, Vec::new(), vec![problem], old));
            }
        };
        let hash = content_hash(&bytes);
        if let Some(old) = old {
            if old.hash == hash {
                return Read::Same;
            }
            let emptied = bytes.iter().all(u8::is_ascii_whitespace) && !old.objects.is_empty();
            if emptied && stamp.age() < EMPTIED_GRACE {
                return Read::Wait;
            }
        }
        let (mut objects, mut problems) = (Vec::new(), Vec::new());
        match std::str::from_utf8(&bytes) {
            Ok(text) => {
                for document in yaml::documents(text) {
                    match document {
                        Ok(document) => {
                            let decoded = decode::document(&document, &file);
                            objects.extend(decoded.objects);
                            problems.extend(decoded.problems);
                        }
                        Err(e) => problems.push(syntax(&file, &e)),
                    }
                }
            }
            Err(e) => {
                let before = &bytes[..e.valid_up_to()];
                let line = u32::try_from(before.iter().filter(|b| **b == b'\n').count() + 1)
                    .unwrap_or(u32::MAX);
                let message = "not UTF-8 text; save the file as UTF-8".to_owned();
                problems.push(Problem {
                    severity: Severity::Error,
                    file,
                    line,
                    object: None,
                    field: String::new(),
                    message,
                });
            }
        }
        Read::New(keep(stamp, hash, objects, problems, old))
    }

    fn assemble(&self) -> (Snapshot, Vec<Problem>) {
        let mut objects: Vec<AnyObject> = self
            .files
            .values()
            .flat_map(|f| f.objects.iter().cloned())
            .collect();
        // An object that moved to another file and is broken there has its last good version in the old snapshot only.
        let present: HashSet<ObjectKey> = objects.iter().map(AnyObject::key).collect();
        let broken: BTreeSet<&ObjectKey> = self
            .files
            .values()
            .flat_map(|f| &f.problems)
            .filter(|p| p.severity == Severity::Error)
            .filter_map(|p| p.object.as_ref())
            .filter(|key| !present.contains(key))
            .collect();
        objects.extend(broken.into_iter().filter_map(|key| self.snapshot.get(key)));
        Snapshot::assemble(objects, &self.snapshot)
    }

    fn finish(
        &mut self,
        assembled: Option<(Snapshot, Vec<Problem>)>,
        walk_problems: Vec<Problem>,
        again: Option<Duration>,
    ) -> Reloaded {
        let walk_changed = self.walk_problems != walk_problems;
        self.walk_problems = walk_problems;
        let Some((snapshot, duplicates)) = assembled else {
            if !walk_changed {
                return Reloaded {
                    update: None,
                    again,
                };
            }
            let others = self
                .problems
                .iter()
                .filter(|p| !self.walk_problems.contains(p))
                .cloned()
                .collect();
            return Reloaded {
                update: Some(self.publish(None, others)),
                again,
            };
        };
        let of_files = self.files.values().flat_map(|f| {
            f.problems.iter().map(|p| {
                let kept = p.severity == Severity::Error
                    && match &p.object {
                        Some(key) => snapshot.get(key).is_some(),
                        None => !f.objects.is_empty(),
                    };
                let mut p = p.clone();
                if kept {
                    p.message.push_str(KEPT);
                }
                p
            })
        });
        let problems = of_files.chain(duplicates).collect();
        let update = self.publish(Some(snapshot), problems);
        Reloaded {
            update: Some(update),
            again,
        }
    }

    fn publish(&mut self, snapshot: Option<Snapshot>, mut problems: Vec<Problem>) -> Update {
        problems.extend(self.walk_problems.iter().cloned());
        for p in problems.iter().filter(|p| !self.problems.contains(p)) {
            match p.severity {
                Severity::Error => error!("{p}"),
                Severity::Warning => warn!("{p}"),
            }
        }
        for p in self.problems.iter().filter(|p| !problems.contains(p)) {
            info!("no longer: {p}");
        }
        let mut changed = BTreeSet::new();
        if let Some(snapshot) = snapshot {
            changed = snapshot.changed_since(&self.snapshot);
            self.snapshot = Arc::new(snapshot);
        }
        self.problems = Arc::new(problems);
        Update {
            snapshot: self.snapshot.clone(),
            changed,
            problems: self.problems.clone(),
        }
    }
}

enum Read {
    Same,
    Wait,
    New(FileState),
}

/// The state of a file, with the last good version of what can no longer be read.
fn keep(
    mut stamp: Stamp,
    hash: u64,
    mut objects: Vec<AnyObject>,
    problems: Vec<Problem>,
    old: Option<&FileState>,
) -> FileState {
    stamp.read_at = SystemTime::now();
    if let Some(old) = old {
        // The same object in memory tells everyone that nothing happened to it.
        for object in &mut objects {
            let same = old
                .objects
                .iter()
                .find(|o| o.same_content(object) && o.source() == object.source());
            if let Some(same) = same {
                *object = same.clone();
            }
        }
        let present: HashSet<ObjectKey> = objects.iter().map(AnyObject::key).collect();
        let errors = || problems.iter().filter(|p| p.severity == Severity::Error);
        // A document without a readable name could be any of those that are missing.
        let any = errors().any(|p| p.object.is_none());
        let broken: HashSet<&ObjectKey> = errors().filter_map(|p| p.object.as_ref()).collect();
        let kept = old.objects.iter().filter(|o| {
            let key = o.key();
            !present.contains(&key) && (any || broken.contains(&key))
        });
        objects.extend(kept.cloned());
    }
    FileState {
        stamp,
        hash,
        objects,
        problems,
    }
}

fn content_hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

const KEPT: &str = "; the last good version stays in force";
/// How long an emptied file is given for its new content.
const EMPTIED_GRACE: Duration = Duration::from_millis(400);
const EMPTIED_WAIT: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests;
