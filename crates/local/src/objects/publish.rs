//! Writes the completed objects where the control plane watches, each file in one step and only where it changed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    error::{Doing, Result},
    state::write_atomically,
};

/// The published folder and what stands in it.
#[derive(Debug)]
pub(crate) struct Publisher {
    folder: PathBuf,
    written: BTreeMap<PathBuf, Vec<u8>>,
}

impl Publisher {
    /// Starts with an empty folder.
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        match fs::remove_dir_all(folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).doing(|| format!("empty {}", folder.display()));
            }
            _ => {}
        }
        fs::create_dir_all(folder).doing(|| format!("make {}", folder.display()))?;
        Ok(Self {
            folder: folder.to_owned(),
            written: BTreeMap::new(),
        })
    }

    /// Makes the folder hold exactly these: the user's files below `user`, objects below `completed`.
    ///
    /// New content is there before old content goes, so that an object that moves between files is never missing.
    pub(crate) fn publish(
        &mut self,
        files: &BTreeMap<PathBuf, String>,
        objects: &BTreeMap<PathBuf, Value>,
    ) -> Result<()> {
        let mut wanted = BTreeMap::new();
        for (path, text) in files {
            wanted.insert(Path::new("user").join(path), text.clone().into_bytes());
        }
        for (path, object) in objects {
            let text = serde_saphyr::to_string(object).expect("every JSON value is YAML");
            wanted.insert(Path::new("completed").join(path), text.into_bytes());
        }
        for (path, bytes) in &wanted {
            if self.written.get(path) != Some(bytes) {
                let target = self.folder.join(path);
                let parent = target.parent().unwrap_or(&self.folder);
                fs::create_dir_all(parent).doing(|| format!("make {}", parent.display()))?;
                write_atomically(&target, bytes)?;
            }
        }
        for path in self.written.keys().filter(|p| !wanted.contains_key(*p)) {
            let target = self.folder.join(path);
            fs::remove_file(&target).doing(|| format!("remove {}", target.display()))?;
        }
        self.written = wanted;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_follows_and_unchanged_files_stay_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let mut p = Publisher::new(&dir.path().join("config")).unwrap();
        let files = |t: &str| BTreeMap::from([(PathBuf::from("sub/a.yaml"), t.to_owned())]);
        let objects = BTreeMap::from([(
            PathBuf::from("pod.a.yaml"),
            serde_json::json!({"kind": "Pod"}),
        )]);
        p.publish(&files("one"), &objects).unwrap();
        let pod = dir.path().join("config/completed/pod.a.yaml");
        let before = fs::metadata(&pod).unwrap();
        p.publish(&files("two"), &objects).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!(before.ino(), fs::metadata(&pod).unwrap().ino());
        assert_eq!(
            fs::read_to_string(dir.path().join("config/user/sub/a.yaml")).unwrap(),
            "two"
        );
        p.publish(&BTreeMap::new(), &objects).unwrap();
        assert!(!dir.path().join("config/user/sub/a.yaml").exists());
    }
}
