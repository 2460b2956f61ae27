//! `OUTPUT_CERTS`: certificates as files, for programs that read them themselves.

use std::{fs, io, path::Path};

use base::file::replace;

use super::Current;

/// Writes chain, key and roots as Istio's agent names them. Each file is replaced in one step; the key is the owner's.
pub(super) fn write(folder: &Path, current: &Current) -> Result<(), String> {
    let fail = |path: &Path, e: io::Error| format!("OUTPUT_CERTS {}: {e}", path.display());
    fs::create_dir_all(folder).map_err(|e| fail(folder, e))?;
    let put = |name: &str, text: &str, mode: u32| {
        let path = folder.join(name);
        replace(&path, text.as_bytes(), mode).map_err(|e| fail(&path, e))
    };
    if let Some(pair) = &current.pair {
        put("key.pem", &pair.key, 0o600)?;
        put("cert-chain.pem", &pair.chain, 0o644)?;
    }
    if let Some(roots) = &current.roots {
        put("root-cert.pem", roots, 0o644)?;
    }
    Ok(())
}
