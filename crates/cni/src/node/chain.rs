//! The network's list of plug-ins, and our place at its end.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{Settings, TYPE, io, replace};
use crate::CniError;

/// Puts our entry into the list that the runtime takes; does nothing where it is there.
pub(super) fn keep(settings: &Settings) -> Result<(), CniError> {
    let path = list(&settings.net)?;
    let text = read(&path)?;
    match with(&text, settings.entry()).map_err(|why| io(&path.display().to_string(), &why))? {
        Some(changed) => {
            replace(&path, changed.as_bytes(), 0o644)?;
            eprintln!("info\t{}: the plug-in is in the chain", path.display());
            Ok(())
        }
        None => Ok(()),
    }
}

/// Takes it out again.
pub(super) fn leave(settings: &Settings) -> Result<(), CniError> {
    let path = list(&settings.net)?;
    let text = read(&path)?;
    match without(&text).map_err(|why| io(&path.display().to_string(), &why))? {
        Some(changed) => replace(&path, changed.as_bytes(), 0o644),
        None => Ok(()),
    }
}

/// Whether it is there.
pub(super) fn is_kept(settings: &Settings) -> Result<(), CniError> {
    let path = list(&settings.net)?;
    match with(&read(&path)?, settings.entry()) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(io(
            &path.display().to_string(),
            &"the plug-in is not in the chain",
        )),
        Err(why) => Err(io(&path.display().to_string(), &why)),
    }
}

/// The runtime takes the first configuration by name.
fn list(folder: &Path) -> Result<PathBuf, CniError> {
    let what = folder.display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| io(&what, &e))? {
        let path = entry.map_err(|e| io(&what, &e))?.path();
        let kind = path.extension().and_then(|e| e.to_str());
        if matches!(kind, Some("conflist" | "conf" | "json")) {
            found.push(path);
        }
    }
    found.sort();
    let Some(first) = found.into_iter().next() else {
        return Err(io(&what, &"no network is set up yet"));
    };
    match first.extension().and_then(|e| e.to_str()) {
        Some("conflist") => Ok(first),
        _ => Err(io(
            &first.display().to_string(),
            &"the node's network is a single plug-in, and only a list (.conflist) can be added to",
        )),
    }
}

fn read(path: &Path) -> Result<String, CniError> {
    fs::read_to_string(path).map_err(|e| io(&path.display().to_string(), &e))
}

/// The list with our entry at its end; none where it stands so already.
fn with(text: &str, entry: Value) -> Result<Option<String>, String> {
    let (mut list, mut others, ours) = parts(text)?;
    let last = list["plugins"].as_array().and_then(|p| p.last());
    if ours == 1 && last == Some(&entry) {
        return Ok(None);
    }
    others.push(entry);
    list["plugins"] = others.into();
    Ok(Some(format!("{list:#}\n")))
}

/// The list without us; none where we are not in it.
fn without(text: &str) -> Result<Option<String>, String> {
    let (mut list, others, ours) = parts(text)?;
    if ours == 0 {
        return Ok(None);
    }
    list["plugins"] = others.into();
    Ok(Some(format!("{list:#}\n")))
}

/// The list, the entries of others, and how many are ours.
fn parts(text: &str) -> Result<(Value, Vec<Value>, usize), String> {
    let list: Value = serde_json::from_str(text).map_err(|e| format!("it is no JSON: {e}"))?;
    let Some(all) = list["plugins"].as_array() else {
        return Err("it has no list `plugins`".to_owned());
    };
    let others: Vec<Value> = all.iter().filter(|p| p["type"] != TYPE).cloned().collect();
    let ours = all.len() - others.len();
    if others.is_empty() {
        return Err("no plug-in of the network itself is in it".to_owned());
    }
    Ok((list, others, ours))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_entry_stands_at_the_end_once() {
        let list = r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge", "mtu": 1400}, {"type": "portmap"}]}"#;
        let entry = json!({"type": TYPE, "kubeconfig": "/k"});
        let first = with(list, entry.clone()).unwrap().unwrap();
        let value: Value = serde_json::from_str(&first).unwrap();
        assert_eq!(value["name"], "net");
        assert_eq!(
            value["plugins"],
            json!([{"type": "bridge", "mtu": 1400}, {"type": "portmap"}, {"type": TYPE, "kubeconfig": "/k"}])
        );
        assert_eq!(with(&first, entry.clone()).unwrap(), None);
        // Another token's path, or another plug-in behind ours: it is put right.
        let moved = with(&first, json!({"type": TYPE, "kubeconfig": "/l"})).unwrap();
        assert!(moved.unwrap().contains("/l"));
        let mut behind = value.clone();
        behind["plugins"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "bandwidth"}));
        let value: Value =
            serde_json::from_str(&with(&behind.to_string(), entry).unwrap().unwrap()).unwrap();
        assert_eq!(value["plugins"][3]["type"], TYPE);
        assert_eq!(value["plugins"].as_array().unwrap().len(), 4);
        let gone: Value = serde_json::from_str(&without(&first).unwrap().unwrap()).unwrap();
        assert_eq!(gone, serde_json::from_str::<Value>(list).unwrap());
        assert_eq!(without(list).unwrap(), None);
    }

    #[test]
    fn what_is_no_list_is_told() {
        let entry = json!({"type": TYPE});
        for (text, why) in [
            ("{", "no JSON"),
            ("{}", "plugins"),
            (
                r#"{"plugins": [{"type": "istio-cni"}]}"#,
                "the network itself",
            ),
        ] {
            let said = with(text, entry.clone()).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
        let folder = tempfile::tempdir().unwrap();
        let said = list(folder.path()).unwrap_err().to_string();
        assert!(said.contains("no network is set up yet"), "{said}");
        fs::write(folder.path().join("10-a.conflist"), "{}").unwrap();
        fs::write(folder.path().join("ZZZ-istio-cni-kubeconfig"), "").unwrap();
        assert!(list(folder.path()).unwrap().ends_with("10-a.conflist"));
        fs::write(folder.path().join("05-b.conf"), "{}").unwrap();
        let said = list(folder.path()).unwrap_err().to_string();
        assert!(said.contains("single plug-in"), "{said}");
    }
}
