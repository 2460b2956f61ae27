//! Pods from files: on one machine the mesh keeps its completed objects in a folder.

use std::{fs, path::Path};

use serde_json::Value;

use crate::CniError;

/// The pod of that name, if a file below `folder` has it.
pub(crate) fn pod(folder: &str, namespace: &str, name: &str) -> Result<Option<Value>, CniError> {
    let mut folders = vec![Path::new(folder).to_path_buf()];
    while let Some(folder) = folders.pop() {
        let fail = |e: std::io::Error| CniError::Io {
            what: folder.display().to_string(),
            why: e.to_string(),
        };
        for entry in fs::read_dir(&folder).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let known = ["yaml", "yml", "json"];
            let kind = path.extension().and_then(|e| e.to_str());
            if !kind.is_some_and(|k| known.contains(&k)) {
                continue;
            }
            let text = fs::read_to_string(&path).map_err(|e| CniError::Io {
                what: path.display().to_string(),
                why: e.to_string(),
            })?;
            // Parsing is what costs: only files that speak of the pod are taken apart.
            if !text.contains(name) || !text.contains("Pod") {
                continue;
            }
            for part in text.split("\n---") {
                let Ok(object) = serde_saphyr::from_str::<Value>(part) else {
                    continue;
                };
                let meta = &object["metadata"];
                let place = meta["namespace"].as_str().unwrap_or("default");
                if object["kind"] == "Pod" && meta["name"] == name && place == namespace {
                    return Ok(Some(object));
                }
            }
        }
    }
    Ok(None)
}
