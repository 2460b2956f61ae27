//! The key of the authority and what it signs.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base::{clock::Clock, spiffe::Identity};
use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber, string::Ia5String,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;

use super::{CaError, Csr};

/// Life of a certificate where the request does not say.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The longest life that is signed.
const LONGEST_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// Life of a root that is made here.
const ROOT_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);
/// Clocks of peers may be behind ours by this much.
const SKEW: Duration = Duration::from_secs(120);

const KEY: &str = "ca-key.pem";
const CERTIFICATE: &str = "ca-cert.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOT: &str = "root-cert.pem";

/// Where keys are kept.
#[derive(Debug, Clone)]
pub struct Files {
    /// Ours alone, for keys that are made here (`--stateDir`).
    pub state: PathBuf,
    /// A plugged-in authority, if the folder has one (`/etc/cacerts`).
    pub plugged: PathBuf,
}

/// Signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Certificates between a leaf and the root, PEM each.
    intermediates: Vec<String>,
    /// The roots that peers are to trust, PEM.
    roots: String,
    not_after: SystemTime,
    clock: Clock,
}

impl std::fmt::Debug for Authority {
    /// Without its key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// The plugged-in authority, else the one in the state folder, which is made at the first start.
    pub fn open(files: &Files, trust_domain: &str, clock: Clock) -> Result<Self, CaError> {
        match Self::plugged(&files.plugged, clock.clone())? {
            Some(plugged) => Ok(plugged),
            None => Self::own(&files.state, trust_domain, clock),
        }
    }

    fn plugged(folder: &Path, clock: Clock) -> Result<Option<Self>, CaError> {
        let names = [KEY, CERTIFICATE, CHAIN, ROOT];
        let missing: Vec<_> = names
            .into_iter()
            .filter(|name| !folder.join(name).exists())
            .collect();
        if missing.len() == names.len() {
            return Ok(None);
        }
        if let Some(missing) = missing.first() {
            return Err(CaError::Incomplete {
                folder: folder.to_owned(),
                missing,
            });
        }
        let chain = certificates(&folder.join(CHAIN))?;
        let roots = read(&folder.join(ROOT))?;
        Self::load(folder, chain, roots, clock).map(Some)
    }

    fn own(folder: &Path, trust_domain: &str, clock: Clock) -> Result<Self, CaError> {
        let key = folder.join(KEY);
        if !key.exists() {
            make_root(folder, trust_domain, &clock)?;
        }
        private(&key)?;
        let roots = read(&folder.join(CERTIFICATE))?;
        Self::load(folder, Vec::new(), roots, clock)
    }

    fn load(
        folder: &Path,
        intermediates: Vec<String>,
        roots: String,
        clock: Clock,
    ) -> Result<Self, CaError> {
        let (key_path, cert_path) = (folder.join(KEY), folder.join(CERTIFICATE));
        let pem = |path: &Path, problem: String| CaError::Pem {
            path: path.to_owned(),
            problem,
        };
        // What is wrong with a key is told without any of it.
        let key = KeyPair::from_pem(&read(&key_path)?)
            .map_err(|_| pem(&key_path, "no private key in PEM (PKCS#8)".to_owned()))?;
        let text = read(&cert_path)?;
        let der = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|e| pem(&cert_path, format!("no certificate in PEM: {e}")))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der)
            .map_err(|e| pem(&cert_path, e.to_string()))?;
        if !parsed.is_ca() {
            return Err(pem(
                &cert_path,
                "not the certificate of an authority".to_owned(),
            ));
        }
        if parsed.public_key().raw != key.subject_public_key_info().as_slice() {
            return Err(pem(
                &cert_path,
                format!("not the certificate of the key in {KEY}"),
            ));
        }
        let not_after = parsed.validity().not_after.timestamp();
        let not_after = UNIX_EPOCH + Duration::from_secs(u64::try_from(not_after).unwrap_or(0));
        let issuer =
            Issuer::from_ca_cert_der(&der, key).map_err(|e| pem(&cert_path, e.to_string()))?;
        Ok(Self {
            issuer,
            intermediates,
            roots,
            not_after,
            clock,
        })
    }

    /// The roots that peers are to trust, PEM.
    pub fn roots(&self) -> &str {
        &self.roots
    }

    /// Signs the key of a request for `identity`: the leaf, what is between, and the root.
    ///
    /// `lifetime` zero is the default; a certificate never outlives the authority.
    pub fn sign(
        &self,
        identity: &Identity,
        csr: &Csr,
        lifetime: Duration,
    ) -> Result<Vec<String>, CaError> {
        let uri =
            Ia5String::try_from(identity.to_string()).map_err(|e| CaError::Sign(e.to_string()))?;
        let mut params = self.leaf(lifetime)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        let leaf = params
            .signed_by(&csr.key, &self.issuer)
            .map_err(|e| CaError::Sign(e.to_string()))?;
        let mut out = vec![leaf.pem()];
        out.extend(self.intermediates.iter().cloned());
        out.push(self.roots.clone());
        Ok(out)
    }

    /// A certificate and key of ours for these DNS names, PEM: for the ports that proxies and the API server call.
    pub fn serve(&self, names: &[String]) -> Result<(String, String), CaError> {
        let sign = |e: rcgen::Error| CaError::Sign(e.to_string());
        let key = KeyPair::generate().map_err(sign)?;
        let mut params = self.leaf(LONGEST_LIFETIME)?;
        for name in names {
            let name = Ia5String::try_from(name.as_str()).map_err(sign)?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        let leaf = params.signed_by(&key, &self.issuer).map_err(sign)?;
        let chain = std::iter::once(leaf.pem()).chain(self.intermediates.iter().cloned());
        Ok((chain.collect(), key.serialize_pem()))
    }

    /// What is the same in every leaf (X.509 as Istio's CA writes it: no subject, so that only the name counts).
    fn leaf(&self, lifetime: Duration) -> Result<CertificateParams, CaError> {
        let lifetime = match lifetime {
            Duration::ZERO => DEFAULT_LIFETIME,
            asked if asked > LONGEST_LIFETIME => {
                return Err(CaError::Lifetime {
                    asked,
                    longest: LONGEST_LIFETIME,
                });
            }
            asked => asked,
        };
        let now = self.clock.now();
        if now >= self.not_after {
            return Err(CaError::AuthorityExpired {
                until: OffsetDateTime::from(self.not_after).to_string(),
            });
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = (now - SKEW).into();
        params.not_after = (now + lifetime).min(self.not_after).into();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.serial_number = Some(serial()?);
        Ok(params)
    }
}

/// 127 random bits: positive, and not to be guessed.
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0; 16];
    getrandom(&mut bytes)?;
    bytes[0] &= 0x7f;
    Ok(SerialNumber::from_slice(&bytes))
}

fn getrandom(bytes: &mut [u8]) -> Result<(), CaError> {
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(bytes)
        .map_err(|_| CaError::Sign("no random numbers".to_owned()))
}

/// A root of our own. Its key is written last: it is what the next start looks for.
fn make_root(folder: &Path, trust_domain: &str, clock: &Clock) -> Result<(), CaError> {
    let sign = |e: rcgen::Error| CaError::Sign(e.to_string());
    let key = KeyPair::generate().map_err(sign)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    let now = clock.now();
    params.not_before = (now - SKEW).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial()?);
    let root = params.self_signed(&key).map_err(sign)?;
    let file = |path: &Path| {
        let path = path.to_owned();
        |source| CaError::File { path, source }
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(file(folder))?;
    let certificate = folder.join(CERTIFICATE);
    write(&certificate, root.pem().as_bytes(), 0o644).map_err(file(&certificate))?;
    let path = folder.join(KEY);
    write(&path, key.serialize_pem().as_bytes(), 0o600).map_err(file(&path))
}

/// Under another name first, so that nobody ever finds half a file.
fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

fn read(path: &Path) -> Result<String, CaError> {
    fs::read_to_string(path).map_err(|source| CaError::File {
        path: path.to_owned(),
        source,
    })
}

fn certificates(path: &Path) -> Result<Vec<String>, CaError> {
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
fn private(path: &Path) -> Result<(), CaError> {
    let meta = fs::metadata(path).map_err(|source| CaError::File {
        path: path.to_owned(),
        source,
    })?;
    if meta.mode() & 0o077 != 0 {
        return Err(CaError::Exposed {
            path: path.to_owned(),
        });
    }
    Ok(())
}
