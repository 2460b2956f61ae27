//! Certificate requests, strictly read.

use base::spiffe::Identity;
use rcgen::{CertificateSigningRequestParams, IsCa, PublicKey, SanType};
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{
    certification_request::X509CertificationRequest, prelude::FromDer, public_key::PublicKey as Key,
};

use super::CaError;

/// A request is a key and a few names: what is larger is none.
const MAX_BYTES: usize = 64 * 1024;
/// RSA keys below this are not signed, and above [`MAX_RSA_BITS`] neither: checking them would cost more than is due.
const MIN_RSA_BITS: usize = 2048;
const MAX_RSA_BITS: usize = 8192;

/// A request whose sender holds the key: its own signature was checked.
#[derive(Debug)]
pub struct Csr {
    pub(super) key: PublicKey,
}

impl Csr {
    /// Reads a PEM request of `caller`.
    ///
    /// The names in it say nothing about who the caller is. They may be absent or say the same; asking for another
    /// name, or for a certificate that can sign others, is refused: whoever does so is mistaken or worse.
    pub fn read(pem: &str, caller: &Identity) -> Result<Self, CaError> {
        if pem.len() > MAX_BYTES {
            return Err(wrong(format!(
                "{} bytes; at most {MAX_BYTES} are read",
                pem.len()
            )));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| wrong("no PEM block CERTIFICATE REQUEST"))?;
        let (rest, parsed) =
            X509CertificationRequest::from_der(&der).map_err(|e| wrong(format!("PKCS#10: {e}")))?;
        if !rest.is_empty() {
            return Err(wrong(format!("{} bytes behind its end", rest.len())));
        }
        check_key(&parsed)?;
        let read = CertificateSigningRequestParams::from_der(&der)
            .map_err(|e| wrong(format!("{e} (its own signature, or an extension)")))?;
        match read.params.is_ca {
            IsCa::NoCa | IsCa::ExplicitNoCa => {}
            IsCa::Ca(_) => return Err(wrong("it asks for a CA certificate")),
        }
        let own = caller.to_string();
        for name in &read.params.subject_alt_names {
            match name {
                SanType::URI(uri) if uri.as_str() == own => {}
                other => {
                    return Err(CaError::OtherIdentity {
                        asked: asked(other),
                        caller: caller.clone(),
                    });
                }
            }
        }
        Ok(Self {
            key: read.public_key,
        })
    }
}

fn check_key(request: &X509CertificationRequest<'_>) -> Result<(), CaError> {
    let info = &request.certification_request_info.subject_pki;
    let key = info
        .parsed()
        .map_err(|e| wrong(format!("public key: {e}")))?;
    match key {
        Key::RSA(rsa) if (MIN_RSA_BITS..=MAX_RSA_BITS).contains(&rsa.key_size()) => Ok(()),
        Key::RSA(rsa) => Err(wrong(format!(
            "an RSA key of {} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are signed",
            rsa.key_size()
        ))),
        // Other curves fail at the check of the signature.
        _ => Ok(()),
    }
}

fn asked(name: &SanType) -> String {
    match name {
        SanType::URI(uri) => uri.to_string(),
        SanType::DnsName(name) => format!("DNS:{name}"),
        SanType::Rfc822Name(name) => format!("email:{name}"),
        SanType::IpAddress(ip) => format!("IP:{ip}"),
        _ => "a name of another kind".to_owned(),
    }
}

fn wrong(problem: impl Into<String>) -> CaError {
    CaError::Csr(problem.into())
}
