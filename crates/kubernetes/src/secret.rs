//! Files that all replicas share, kept in a Secret: the first replica makes them, the others take them over.

use std::{collections::BTreeMap, fs, io, os::unix::fs::OpenOptionsExt, path::Path};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};

use crate::{ClusterError, code};

/// Writes the files of the Secret `namespace/name` into `folder`, if there is such a Secret. Whether there is.
pub async fn take(
    client: &Client,
    namespace: &str,
    name: &str,
    folder: &Path,
) -> Result<bool, ClusterError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let what = || format!("Secret {namespace}/{name}");
    let found = api
        .get_opt(name)
        .await
        .map_err(ClusterError::request(what()))?;
    let Some(secret) = found else {
        return Ok(false);
    };
    for (file, bytes) in secret.data.unwrap_or_default() {
        // A key of a Secret is a file name by its rules; this one becomes a path of ours.
        if file.is_empty() || file.starts_with('.') || file.contains('/') {
            continue;
        }
        write(&folder.join(&file), &bytes.0).map_err(|e| ClusterError::Object {
            what: what(),
            why: format!("{}: {e}", folder.join(&file).display()),
        })?;
    }
    Ok(true)
}

/// Makes the Secret from these files of `folder`. Whether it was made: another replica may have been faster.
pub async fn give(
    client: &Client,
    namespace: &str,
    name: &str,
    kind: &str,
    folder: &Path,
    files: &[&str],
) -> Result<bool, ClusterError> {
    let what = || format!("Secret {namespace}/{name}");
    let mut data = BTreeMap::new();
    for file in files {
        let path = folder.join(file);
        let bytes = fs::read(&path).map_err(|e| ClusterError::Object {
            what: what(),
            why: format!("{}: {e}", path.display()),
        })?;
        data.insert((*file).to_owned(), ByteString(bytes));
    }
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some([("app".to_owned(), "istiod".to_owned())].into()),
            ..ObjectMeta::default()
        },
        type_: Some(kind.to_owned()),
        data: Some(data),
        ..Secret::default()
    };
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    match api.create(&PostParams::default(), &secret).await {
        Ok(_) => Ok(true),
        Err(e) if code(&e) == Some(409) => Ok(false),
        Err(e) => Err(ClusterError::request(what())(e)),
    }
}

/// For us alone, and never half of it.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use io::Write;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}
