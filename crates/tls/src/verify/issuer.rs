//! Who vouched for a peer: the certificate that its own was verified with.
//!
//! rustls hands nothing on from the judgement to the session, and a session that is taken up again is not judged anew. So
//! the path is looked for a second time, by whoever asks for it: only for the logs that want it.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter};

use super::{Validation, best_time, of_domain};
use crate::{certificate::Certificate, trust::Trust};

/// The certificate that a peer's was verified with, as far as logs tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issuer {
    /// SHA-256 of the whole certificate.
    pub sha256: [u8; 32],
    /// Serial number, lower-case hex.
    pub serial: Box<str>,
}

impl Validation {
    /// Who issued the first certificate of a chain that was accepted: an intermediate one of the chain, or a trusted one.
    /// `None` where nothing is trusted, where the certificate is trusted by itself, and where no path is found.
    pub fn issuer(&self, chain: &[CertificateDer<'_>]) -> Option<Issuer> {
        let (leaf, intermediates) = chain.split_first()?;
        let certificate = Certificate::read(leaf).ok()?;
        let trust = match &*self.trust_domains {
            [] => self.trust.as_ref()?,
            domains => of_domain(domains, &certificate).ok()?,
        };
        if trust.certificates.iter().any(|trusted| trusted == leaf) {
            return None;
        }
        // It was judged when it came: that its time is over by now changes nothing.
        let then = best_time(&certificate, intermediates);
        let leaf = EndEntityCert::try_from(leaf).ok()?;
        let algorithms = crate::parameters::default_provider();
        let path = leaf
            .verify_for_usage(
                algorithms.signature_verification_algorithms.all,
                &trust.anchors,
                intermediates,
                then,
                AnyUsage,
                None,
                None,
            )
            .ok()?;
        let der = match path.intermediate_certificates().next() {
            Some(issuer) => issuer.der(),
            None => of_anchor(trust, path.anchor())?.clone(),
        };
        let issuer = Certificate::read(&der).ok()?;
        Some(Issuer {
            sha256: issuer.sha256,
            serial: issuer.serial,
        })
    }
}

/// The certificate that an anchor was made of; both lists have one order.
fn of_anchor<'t>(
    trust: &'t Arc<Trust>,
    anchor: &rustls_pki_types::TrustAnchor<'_>,
) -> Option<&'t CertificateDer<'static>> {
    let at = trust.anchors.iter().position(|known| known == anchor)?;
    trust.certificates.get(at)
}

/// What the certificate is for was judged before.
struct AnyUsage;

impl ExtendedKeyUsageValidator for AnyUsage {
    fn validate(&self, _iter: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}
