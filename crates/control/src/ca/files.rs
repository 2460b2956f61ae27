//! The authority's files: read and written so that nobody finds half of one, and keys only by their owner.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::CaError;

/// A folder for keys, made for its owner alone.
pub(super) fn folder(path: &Path) -> Result<(), CaError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(of(path))
}

/// Puts a file in place, all of it or nothing.
pub(super) fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CaError> {
    base::file::replace(path, bytes, mode).map_err(of(path))
}

/// Removes a file; it may be gone already.
pub(super) fn remove(path: &Path) -> Result<(), CaError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(of(path)(e)),
        _ => Ok(()),
    }
}

pub(super) fn read(path: &Path) -> Result<String, CaError> {
    fs::read_to_string(path).map_err(of(path))
}

fn of(path: &Path) -> impl FnOnce(io::Error) -> CaError {
    let path = path.to_owned();
    |source| CaError::File { path, source }
}

/// The certificates of a file, PEM each.
pub(super) fn certificates(path: &Path) -> Result<Vec<String>, CaError> {
    let text = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    found
        .map_err(|e| CaError::Pem {
            path: path.to_owned(),
            problem: format!("no certificates in PEM: {e}"),
        })
        .map(|all| all.iter().map(|der| pem(der)).collect())
}

/// A certificate in PEM (RFC 7468: 64 characters a line).
fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        out.extend(line.iter().map(|b| char::from(*b)));
        out.push('\n');
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

/// A key that others may read is not a secret.
pub(super) fn private(path: &Path) -> Result<(), CaError> {
    let meta = fs::metadata(path).map_err(of(path))?;
    if meta.mode() & 0o077 != 0 {
        return Err(CaError::Exposed {
            path: path.to_owned(),
        });
    }
    Ok(())
}
