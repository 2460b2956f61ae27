//! One key of the authority and what it signs.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base::{clock::Clock, spiffe::Identity};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber, string::Ia5String,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;

use super::{CaError, Csr, files};

/// Life of a certificate where the request does not say.
pub(super) const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The longest life that is signed.
pub(super) const LONGEST_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// Life of a root that is made here.
const ROOT_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);
/// Clocks of peers may be behind ours by this much.
const SKEW: Duration = Duration::from_secs(120);

/// Signs with one key.
pub(super) struct Signer {
    issuer: Issuer<'static, KeyPair>,
    /// Certificates between a leaf and the root, PEM each.
    intermediates: Vec<String>,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    clock: Clock,
}

impl Signer {
    /// Reads a key and its certificate.
    pub(super) fn load(
        key_path: &Path,
        cert_path: &Path,
        intermediates: Vec<String>,
        clock: Clock,
    ) -> Result<Self, CaError> {
        let pem = |path: &Path, problem: String| CaError::Pem {
            path: path.to_owned(),
            problem,
        };
        // What is wrong with a key is told without any of it.
        let key = KeyPair::from_pem(&files::read(key_path)?)
            .map_err(|_| pem(key_path, "no private key in PEM (PKCS#8)".to_owned()))?;
        let text = files::read(cert_path)?;
        let der = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|e| pem(cert_path, format!("no certificate in PEM: {e}")))?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&der).map_err(|e| pem(cert_path, e.to_string()))?;
        if !parsed.is_ca() {
            return Err(pem(
                cert_path,
                "not the certificate of an authority".to_owned(),
            ));
        }
        if parsed.public_key().raw != key.subject_public_key_info().as_slice() {
            return Err(pem(
                cert_path,
                format!("not the certificate of the key in {}", key_path.display()),
            ));
        }
        let time =
            |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        let not_before = time(parsed.validity().not_before.timestamp());
        let not_after = time(parsed.validity().not_after.timestamp());
        let issuer =
            Issuer::from_ca_cert_der(&der, key).map_err(|e| pem(cert_path, e.to_string()))?;
        Ok(Self {
            issuer,
            intermediates,
            not_before,
            not_after,
            clock,
        })
    }

    /// Signs the key of a request for `identity`: the leaf, and what is between it and the root.
    ///
    /// `lifetime` zero is the default; a certificate never outlives the authority.
    pub(super) fn sign(
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
        Ok(out)
    }

    /// A certificate and key of ours for these DNS names, PEM: for the ports that proxies and the API server call.
    pub(super) fn serve(&self, names: &[String]) -> Result<(String, String), CaError> {
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
        // Roots of one trust domain have one name: this says which of them it was.
        params.use_authority_key_identifier_extension = true;
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

/// A root of our own: its certificate and key, PEM.
pub(super) fn make_root(trust_domain: &str, clock: &Clock) -> Result<(String, String), CaError> {
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
    Ok((root.pem(), key.serialize_pem()))
}
