//! Volumes: folders and files of this machine that stand for what the pod asks for.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use super::{environment::References, root::directory, run::Mount};
use crate::{
    error::Doing,
    objects::{list, text, token::Issuer},
};

/// Makes the pod's volumes below `folder`. An error names the volume and what it lacks.
pub(crate) fn prepare(folder: &Path, refs: &References<'_>, issuer: &Issuer) -> Result<(), String> {
    // Tokens and secrets are for the pod, not for whoever else is on this machine.
    directory(folder, 0o700).map_err(|e| e.to_string())?;
    let group = refs.pod["spec"]["securityContext"]["fsGroup"]
        .as_u64()
        .map(|g| g as u32);
    for volume in list(refs.pod, &["spec", "volumes"]) {
        let name = text(volume, &["name"]);
        let target = folder.join(name);
        let fail = |e: String| format!("volume {name:?}: {e}");
        if volume["hostPath"].is_object() {
            host_path(volume).map_err(fail)?;
            continue;
        }
        directory(&target, 0o755).map_err(|e| e.to_string())?;
        fill(&target, volume, refs, Some(issuer)).map_err(fail)?;
        if let Some(group) = group {
            chown(&target, None, Some(group))
                .map_err(|e| fail(format!("give it to group {group}: {e}")))?;
        }
    }
    let automatic = folder.join(SERVICE_ACCOUNT);
    directory(&automatic, 0o755).map_err(|e| e.to_string())?;
    write(&automatic, "namespace", refs.namespace().as_bytes(), 0o644)?;
    automatic_token(&automatic, refs, issuer)
}

/// Brings volumes in step with what they are made of, as the kubelet does while a pod runs; tokens are signed anew
/// where an issuer is given. A key that is gone leaves its file.
pub(crate) fn update(
    folder: &Path,
    refs: &References<'_>,
    issuer: Option<&Issuer>,
) -> Result<(), String> {
    for volume in list(refs.pod, &["spec", "volumes"]) {
        let kinds = ["configMap", "secret", "projected"];
        if kinds.iter().any(|kind| volume[*kind].is_object()) {
            let name = text(volume, &["name"]);
            fill(&folder.join(name), volume, refs, issuer)
                .map_err(|e| format!("volume {name:?}: {e}"))?;
        }
    }
    match issuer {
        Some(issuer) => automatic_token(&folder.join(SERVICE_ACCOUNT), refs, issuer),
        None => Ok(()),
    }
}

/// How long the pod's tokens live: the shortest of them.
pub(crate) fn token_life(pod: &Value) -> Duration {
    list(pod, &["spec", "volumes"])
        .iter()
        .flat_map(|volume| list(volume, &["projected", "sources"]))
        .filter_map(|source| source.get("serviceAccountToken"))
        .map(|token| Issuer::life(token["expirationSeconds"].as_u64()))
        .min()
        .unwrap_or_else(|| Issuer::life(None))
}

fn automatic_token(target: &Path, refs: &References<'_>, issuer: &Issuer) -> Result<(), String> {
    let token = issuer.sign(refs.pod, "", None).map_err(|e| e.to_string())?;
    write(target, "token", token.as_bytes(), 0o644)
}

fn fill(
    target: &Path,
    volume: &Value,
    refs: &References<'_>,
    issuer: Option<&Issuer>,
) -> Result<(), String> {
    let kind = volume
        .as_object()
        .and_then(|v| v.iter().find(|(k, v)| *k != "name" && !v.is_null()))
        .map(|(k, _)| k.as_str());
    match kind {
        // `emptyDir: {}` may be printed as nothing at all.
        None | Some("emptyDir") => fs::set_permissions(target, fs::Permissions::from_mode(0o777))
            .map_err(|e| e.to_string()),
        Some(kind @ ("configMap" | "secret" | "downwardAPI")) => {
            source(target, kind, &volume[kind], refs)
        }
        Some("projected") => {
            let mode = mode_of(&volume["projected"]["defaultMode"], 0o644);
            for part in list(volume, &["projected", "sources"]) {
                let Some((kind, value)) = part.as_object().and_then(|p| p.iter().next()) else {
                    continue;
                };
                if kind != "serviceAccountToken" {
                    source(target, kind, value, refs)?;
                } else if let Some(issuer) = issuer {
                    let seconds = value["expirationSeconds"].as_u64();
                    let token = issuer
                        .sign(refs.pod, text(value, &["audience"]), seconds)
                        .map_err(|e| e.to_string())?;
                    write(target, text(value, &["path"]), token.as_bytes(), mode)?;
                }
            }
            Ok(())
        }
        Some(other) => Err(format!(
            "`{other}` cannot be had on one machine: use emptyDir, hostPath, configMap, secret, downwardAPI or projected"
        )),
    }
}

/// The files of a ConfigMap, a Secret or the downward API.
fn source(target: &Path, kind: &str, value: &Value, refs: &References<'_>) -> Result<(), String> {
    let mode = mode_of(&value["defaultMode"], 0o644);
    let optional = value["optional"] == Value::Bool(true);
    let entries = match kind {
        "downwardAPI" => {
            for item in list(value, &["items"]) {
                let content = if item["fieldRef"].is_object() {
                    refs.field(text(item, &["fieldRef", "fieldPath"]))?
                } else {
                    let r = &item["resourceFieldRef"];
                    let wanted = text(r, &["containerName"]);
                    let containers = list(refs.pod, &["spec", "containers"]);
                    let container = containers
                        .iter()
                        .find(|c| text(c, &["name"]) == wanted)
                        .unwrap_or(&Value::Null);
                    refs.resource(container, text(r, &["resource"]), text(r, &["divisor"]))?
                };
                write(
                    target,
                    text(item, &["path"]),
                    content.as_bytes(),
                    mode_of(&item["mode"], mode),
                )?;
            }
            return Ok(());
        }
        "secret" => {
            let name = [text(value, &["secretName"]), text(value, &["name"])].concat();
            refs.secret(&name)
                .ok_or_else(|| format!("there is no Secret {}/{name}", refs.namespace()))
        }
        "configMap" => {
            let name = text(value, &["name"]);
            match refs.config_map(name) {
                // The control plane makes the root: until it has, the folder is empty.
                None if name == ROOT_MAP => Ok(refs
                    .roots
                    .map(|roots| (ROOT_KEY.to_owned(), roots.as_bytes().to_vec()))
                    .into_iter()
                    .collect()),
                found => found
                    .ok_or_else(|| format!("there is no ConfigMap {}/{name}", refs.namespace())),
            }
        }
        other => return Err(format!("a projected volume cannot take {other:?} here")),
    };
    let entries = match entries {
        Err(_) if optional => return Ok(()),
        other => other?,
    };
    let items = list(value, &["items"]);
    for (key, content) in &entries {
        if items.is_empty() {
            write(target, key, content, mode)?;
        }
    }
    for item in items {
        let key = text(item, &["key"]);
        match entries.iter().find(|(k, _)| k == key) {
            Some((_, content)) => write(
                target,
                text(item, &["path"]),
                content,
                mode_of(&item["mode"], mode),
            )?,
            None if optional => {}
            None => return Err(format!("it has no key {key:?}")),
        }
    }
    Ok(())
}

fn host_path(volume: &Value) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(volume, &["hostPath", "path"]));
    if !path.is_absolute() {
        return Err(format!("hostPath.path {} must be absolute", path.display()));
    }
    if text(volume, &["hostPath", "type"]) == "DirectoryOrCreate" {
        fs::create_dir_all(&path).map_err(|e| format!("make {}: {e}", path.display()))?;
    }
    if path.exists() {
        Ok(path)
    } else {
        Err(format!(
            "hostPath: there is no {} on this machine",
            path.display()
        ))
    }
}

fn write(folder: &Path, name: &str, content: &[u8], mode: u32) -> Result<(), String> {
    if name.is_empty() || name.split('/').any(|p| p == ".." || p.is_empty()) {
        return Err(format!("{name:?} is not a path inside the volume"));
    }
    let path = folder.join(name);
    if fs::read(&path).is_ok_and(|now| now == content) {
        return Ok(());
    }
    // In one step: whoever reads it in the pod sees the old content or the new.
    let temporary = path.with_file_name(format!(
        ".{}.new",
        path.file_name().unwrap_or_default().to_string_lossy()
    ));
    let result = (|| {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&temporary, content)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(mode))?;
        fs::rename(&temporary, &path)
    })();
    result
        .doing(|| format!("write {}", path.display()))
        .map_err(|e| e.to_string())
}

/// Modes are decimal in JSON and octal in YAML 1.1; both arrive as numbers.
fn mode_of(value: &Value, default: u32) -> u32 {
    value.as_u64().map_or(default, |m| m as u32 & 0o777)
}

/// Where each of a container's volumes comes from and goes to.
pub(crate) fn mounts(folder: &Path, container: &Value, pod: &Value) -> Result<Vec<Mount>, String> {
    let mut out = Vec::new();
    let volumes = list(pod, &["spec", "volumes"]);
    for m in list(container, &["volumeMounts"]) {
        let name = text(m, &["name"]);
        let target = text(m, &["mountPath"]);
        let volume = volumes
            .iter()
            .find(|v| text(v, &["name"]) == name)
            .ok_or_else(|| format!("volumeMounts: the pod has no volume {name:?}"))?;
        let mut source = match volume["hostPath"].is_object() {
            true => host_path(volume)?,
            false => folder.join(name),
        };
        let below = text(m, &["subPath"]);
        if !below.is_empty() {
            source = source.join(below.trim_start_matches('/'));
            if !source.exists() {
                fs::create_dir_all(&source)
                    .map_err(|e| format!("make {}: {e}", source.display()))?;
            }
        }
        out.push(Mount {
            source,
            target: target.into(),
            read_only: m["readOnly"] == Value::Bool(true),
        });
    }
    let own_account = out
        .iter()
        .any(|m| m.target == Path::new(SERVICE_ACCOUNT_PATH));
    if !own_account && pod["spec"]["automountServiceAccountToken"] != Value::Bool(false) {
        out.push(Mount {
            source: folder.join(SERVICE_ACCOUNT),
            target: SERVICE_ACCOUNT_PATH.into(),
            read_only: true,
        });
    }
    // Outer paths first: /var/run/secrets/istio before /var/run/secrets/istio/crl.
    out.sort_by_key(|m| m.target.components().count());
    Ok(out)
}

/// The ConfigMap in which each namespace finds the mesh's roots.
const ROOT_MAP: &str = "istio-ca-root-cert";
const ROOT_KEY: &str = "root-cert.pem";
const SERVICE_ACCOUNT: &str = ".service-account";
const SERVICE_ACCOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

#[cfg(test)]
mod tests {
    use super::*;
    use base::clock::Clock;
    use serde_json::json;
    use std::{collections::HashMap, time::SystemTime};

    fn pod(volumes: Value) -> Value {
        json!({"metadata": {"name": "web", "namespace": "a", "labels": {"app": "web"}},
            "spec": {"serviceAccountName": "sa", "volumes": volumes}})
    }

    fn prepared(volumes: Value) -> (tempfile::TempDir, Result<(), String>) {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(volumes);
        let maps = HashMap::from([(
            ("a".into(), "m".into()),
            json!({"data": {"k": "v", "l": "w"}}),
        )]);
        let refs = References {
            pod: &pod,
            config_maps: &maps,
            secrets: &HashMap::new(),
            roots: None,
        };
        let result = prepare(dir.path(), &refs, &Issuer::new(Clock::system()).unwrap());
        (dir, result)
    }

    #[test]
    fn volumes_hold_what_they_should() {
        let (dir, result) = prepared(json!([
            {"name": "empty"},
            {"name": "map", "configMap": {"name": "m", "items": [{"key": "k", "path": "sub/key"}]}},
            {"name": "info", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"audience": "istio-ca", "path": "istio-token"}}]}},
            {"name": "none", "configMap": {"name": "x", "optional": true}},
        ]));
        result.unwrap();
        let read = |p: &str| fs::read_to_string(dir.path().join(p)).unwrap();
        assert_eq!(read("map/sub/key"), "v");
        assert!(!dir.path().join("map/l").exists());
        assert_eq!(read("info/labels"), "app=\"web\"");
        assert_eq!(read("token/istio-token").split('.').count(), 3);
        assert_eq!(read(".service-account/namespace"), "a");
        let mode = fs::metadata(dir.path().join("empty"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o777);
    }

    #[test]
    fn a_running_pod_gets_new_roots_and_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock::manual(SystemTime::now());
        let issuer = Issuer::new(clock.clone()).unwrap();
        let pod = pod(json!([
            {"name": "roots", "configMap": {"name": "istio-ca-root-cert"}},
            {"name": "token", "projected": {"sources": [
                {"serviceAccountToken": {"audience": "istio-ca", "path": "t", "expirationSeconds": 900}}]}},
        ]));
        assert_eq!(token_life(&pod), Duration::from_secs(900));
        let (maps, secrets) = (HashMap::new(), HashMap::new());
        let refs = |roots| References {
            pod: &pod,
            config_maps: &maps,
            secrets: &secrets,
            roots,
        };
        let read = |p: &str| fs::read_to_string(dir.path().join(p));
        prepare(dir.path(), &refs(None), &issuer).unwrap();
        assert!(read("roots/root-cert.pem").is_err());
        let first = read("token/t").unwrap();
        let mode = fs::metadata(dir.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);

        update(dir.path(), &refs(Some("one")), None).unwrap();
        assert_eq!(read("roots/root-cert.pem").unwrap(), "one");
        assert_eq!(read("token/t").unwrap(), first);
        clock.set(SystemTime::now() + Duration::from_secs(60));
        update(dir.path(), &refs(Some("two")), Some(&issuer)).unwrap();
        assert_eq!(read("roots/root-cert.pem").unwrap(), "two");
        assert_ne!(read("token/t").unwrap(), first);
    }

    #[test]
    fn what_cannot_be_had_is_named() {
        let (_dir, result) =
            prepared(json!([{"name": "disk", "persistentVolumeClaim": {"claimName": "c"}}]));
        let e = result.unwrap_err();
        assert!(
            e.contains("\"disk\"") && e.contains("persistentVolumeClaim"),
            "{e}"
        );
        let (_dir, result) = prepared(json!([{"name": "m", "configMap": {"name": "x"}}]));
        assert!(result.unwrap_err().contains("a/x"));
    }

    #[test]
    fn mounts_are_ordered_from_outside_in() {
        let pod = pod(json!([{"name": "a"}, {"name": "b"}]));
        let container = json!({"volumeMounts": [{"name": "b", "mountPath": "/x/y"}, {"name": "a", "mountPath": "/x"}]});
        let targets: Vec<_> = mounts(Path::new("/v"), &container, &pod)
            .unwrap()
            .into_iter()
            .map(|m| m.target)
            .collect();
        assert_eq!(targets[0], Path::new("/x"));
        assert_eq!(targets[1], Path::new("/x/y"));
        let e = mounts(
            Path::new("/v"),
            &json!({"volumeMounts": [{"name": "z", "mountPath": "/x"}]}),
            &pod,
        );
        assert!(e.unwrap_err().contains("\"z\""));
    }
}
