//! `OUTPUT_CERTS`: certificates as files, for programs that read them themselves.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

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

fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary: PathBuf = path.with_file_name(format!(".{name}.new"));
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)?;
    file.write_all(bytes)?;
    fs::rename(&temporary, path)
}
