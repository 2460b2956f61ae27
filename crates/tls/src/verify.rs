//! The judgement of a peer's certificate, as Envoy's validators pass it.
//!
//! A chain must lead to a trusted certificate (an intermediate one will do) and hold now; then one of the peer's names
//! must be among those that are wanted; then its certificate or key must be among those that are pinned. Each of the
//! three is left out where nothing is configured for it. Names of servers are not compared unless that is asked for.

use std::{fmt, net::IpAddr, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder,
};

mod issuer;

use crate::{
    certificate::{Certificate, hex},
    trust::Trust,
};

pub use issuer::Issuer;

/// A revocation list.
pub type RevocationList = CertRevocationList<'static>;

/// Which names of a certificate are good.
pub trait NamePolicy: fmt::Debug + Send + Sync {
    /// Whether one of the certificate's names is.
    fn accepts(&self, certificate: &Certificate) -> bool;
}

/// How a peer's certificate is judged.
#[derive(Debug, Clone, Default)]
pub struct Validation {
    /// Trusted certificates.
    pub trust: Option<Arc<Trust>>,
    /// Trusted certificates of each SPIFFE trust domain; where there are any, the peer must have a SPIFFE identity
    /// in one of them, and `trust` is not looked at.
    pub trust_domains: Vec<(Box<str>, Arc<Trust>)>,
    /// Revocation lists; where there are any, each certificate must be on none, and its issuer must have one.
    pub revocation_lists: Arc<[RevocationList]>,
    /// Only the leaf is looked for in the lists.
    pub only_leaf_revocation: bool,
    /// Names, one of which the peer must have.
    pub names: Option<Arc<dyn NamePolicy>>,
    /// The peer must be good for the server name that was asked for.
    pub server_name: bool,
    /// SHA-256 of public keys.
    pub spki_pins: Vec<[u8; 32]>,
    /// SHA-256 of certificates.
    pub certificate_hashes: Vec<[u8; 32]>,
    /// The time does not matter.
    pub allow_expired: bool,
    /// A chain that leads to no trusted certificate is good, too.
    pub accept_untrusted: bool,
}

/// What the peer is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// We asked it for a service.
    Server,
    /// It asked us.
    Client,
}

/// How a peer that was accepted stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Its chain leads to a trusted certificate.
    Trusted,
    /// Nobody vouches for it, and nobody needs to.
    Untrusted,
}

/// Why a peer's certificate was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// It cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// Its chain is not good.
    #[error("the certificate {}", reason(.0))]
    Chain(CertificateError),
    /// It has none of the names that are wanted.
    #[error("verify SAN list: none of the names of {0} is accepted")]
    Name(String),
    /// Neither it nor its key is pinned.
    #[error("the certificate of {peer} is not pinned (SHA-256 {hash})")]
    Pin {
        /// Whose it is.
        peer: String,
        /// Its hash.
        hash: String,
    },
    /// It has no SPIFFE identity in a trust domain that is known.
    #[error("SPIFFE: {0}")]
    Spiffe(String),
}

impl Validation {
    /// Whether a client is asked for its certificate.
    pub fn asks(&self) -> bool {
        self.trust.is_some()
            || !self.trust_domains.is_empty()
            || !self.spki_pins.is_empty()
            || !self.certificate_hashes.is_empty()
    }

    /// Judges a peer.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        server_name: Option<&ServerName<'_>>,
        now: UnixTime,
    ) -> Result<Standing, Refusal> {
        let certificate = Certificate::read(leaf).map_err(Refusal::Unreadable)?;
        let trust = match &*self.trust_domains {
            [] => self.trust.as_ref(),
            domains => Some(of_domain(domains, &certificate)?),
        };
        let standing = match trust {
            None => Standing::Untrusted,
            Some(trust) => match self.chain(trust, leaf, intermediates, &certificate, role, now) {
                Ok(()) => Standing::Trusted,
                Err(_) if self.accept_untrusted => Standing::Untrusted,
                Err(refusal) => return Err(refusal),
            },
        };
        let named = self
            .names
            .as_ref()
            .is_none_or(|names| names.accepts(&certificate));
        let asked = !self.server_name || server_name.is_none_or(|name| is_for(leaf, name));
        if !named || !asked {
            return Err(Refusal::Name(who(&certificate)));
        }
        let pinned = self.spki_pins.is_empty() && self.certificate_hashes.is_empty()
            || self.spki_pins.contains(&certificate.spki_sha256)
            || self.certificate_hashes.contains(&certificate.sha256);
        if !pinned {
            return Err(Refusal::Pin {
                peer: who(&certificate),
                hash: hex(&certificate.sha256),
            });
        }
        Ok(standing)
    }

    fn chain(
        &self,
        trust: &Trust,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        certificate: &Certificate,
        role: Role,
        now: UnixTime,
    ) -> Result<(), Refusal> {
        if trust.certificates.iter().any(|trusted| trusted == leaf) {
            // Trusted by itself. A path would have to end in an authority, and such a leaf need not be one.
            return within(certificate, now, self.allow_expired).map_err(Refusal::Chain);
        }
        match self.path(trust, leaf, intermediates, role, now) {
            Err(
                CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYetContext { .. },
            ) if self.allow_expired => {
                // The chain as it was when all of it was good.
                let then = best_time(certificate, intermediates);
                self.path(trust, leaf, intermediates, role, then)
            }
            result => result,
        }
        .map_err(Refusal::Chain)
    }

    fn path(
        &self,
        trust: &Trust,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> Result<(), CertificateError> {
        let leaf = EndEntityCert::try_from(leaf).map_err(error)?;
        let usage = match role {
            Role::Server => KeyUsage::server_auth(),
            Role::Client => KeyUsage::client_auth(),
        };
        let lists: Vec<_> = self.revocation_lists.iter().collect();
        // Fails only without lists, which is when there is nothing to look up.
        let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|options| {
            let depth = match self.only_leaf_revocation {
                true => RevocationCheckDepth::EndEntity,
                false => RevocationCheckDepth::Chain,
            };
            options
                .with_depth(depth)
                .with_expiration_policy(ExpirationPolicy::Enforce)
                .build()
        });
        let algorithms = crate::parameters::default_provider();
        leaf.verify_for_usage(
            algorithms.signature_verification_algorithms.all,
            &trust.anchors,
            intermediates,
            now,
            usage,
            revocation,
            None,
        )
        .map(|_| ())
        .map_err(error)
    }
}

/// The authorities of the trust domain that a certificate claims.
fn of_domain<'a>(
    domains: &'a [(Box<str>, Arc<Trust>)],
    certificate: &Certificate,
) -> Result<&'a Arc<Trust>, Refusal> {
    let refused = |reason: String| Err(Refusal::Spiffe(reason));
    if certificate.is_ca {
        return refused(format!("{} is an authority", who(certificate)));
    }
    let [uri] = &*certificate.uris else {
        return refused(format!(
            "{} must have exactly one URI name, and has {}",
            who(certificate),
            certificate.uris.len()
        ));
    };
    let Some(domain) = trust_domain(uri) else {
        return refused(format!("`{uri}` is not a SPIFFE identity"));
    };
    match domains.iter().find(|(name, _)| &**name == domain) {
        Some((_, trust)) => Ok(trust),
        None => refused(format!("trust domain `{domain}` of `{uri}` is not known")),
    }
}

/// The trust domain of a SPIFFE identity.
pub fn trust_domain(uri: &str) -> Option<&str> {
    let rest = uri.strip_prefix("spiffe://")?;
    let (domain, path) = rest.split_once('/')?;
    (!domain.is_empty() && !path.is_empty()).then_some(domain)
}

/// Whether a certificate is good for a DNS name or address, wildcards included.
fn is_for(leaf: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    EndEntityCert::try_from(leaf)
        .is_ok_and(|leaf| leaf.verify_is_valid_for_subject_name(name).is_ok())
}

fn within(
    certificate: &Certificate,
    now: UnixTime,
    allow_expired: bool,
) -> Result<(), CertificateError> {
    let now = now.as_secs() as i64;
    if allow_expired {
        Ok(())
    } else if now < certificate.not_before {
        Err(CertificateError::NotValidYet)
    } else if now > certificate.not_after {
        Err(CertificateError::Expired)
    } else {
        Ok(())
    }
}

/// A time at which every certificate that was sent is good, where there is one.
fn best_time(leaf: &Certificate, intermediates: &[CertificateDer<'_>]) -> UnixTime {
    let ends = intermediates
        .iter()
        .filter_map(|der| Certificate::read(der).ok())
        .map(|certificate| certificate.not_after);
    let end = ends.fold(leaf.not_after, i64::min);
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(end.max(0) as u64))
}

/// How a peer is called in messages: its identity, else its first name, else its subject.
pub fn who(certificate: &Certificate) -> String {
    let first = certificate.uris.first().or(certificate.dns.first());
    match first {
        Some(name) => format!("`{name}`"),
        None => match certificate.ips.first() {
            Some(ip) => format!("`{}`", IpAddr::to_string(ip)),
            None => format!("`{}`", certificate.subject),
        },
    }
}

/// What is wrong with a certificate, to be put after "the certificate".
pub(crate) fn reason(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet".to_owned()
        }
        CertificateError::UnknownIssuer => "is not signed by a trusted authority".to_owned(),
        CertificateError::Revoked => "is revoked".to_owned(),
        CertificateError::UnknownRevocationStatus => {
            "has an issuer without a revocation list".to_owned()
        }
        CertificateError::BadSignature => "has a signature that is wrong".to_owned(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not for this purpose (extended key usage)".to_owned()
        }
        other => format!("is refused: {other}"),
    }
}

fn error(error: webpki::Error) -> CertificateError {
    use webpki::Error as E;
    match error {
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::CertRevoked => CertificateError::Revoked,
        E::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::InvalidCertificate(match refusal {
            // The peer's alert says which of them it is.
            Refusal::Chain(error) => error,
            // Wrapped, so that the reason comes out of the handshake whole; the alert is `certificate_unknown`.
            refusal => CertificateError::Other(OtherError(Arc::new(refusal))),
        })
    }
}

/// Judges servers for rustls. Without a validation everybody is who they say.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub(crate) validation: Option<Arc<Validation>>,
    pub(crate) provider: Arc<CryptoProvider>,
}

/// Judges clients for rustls.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub(crate) validation: Arc<Validation>,
    pub(crate) required: bool,
    pub(crate) hints: Vec<DistinguishedName>,
    pub(crate) provider: Arc<CryptoProvider>,
}

impl ClientVerifier {
    pub(crate) fn new(
        validation: Arc<Validation>,
        required: bool,
        provider: Arc<CryptoProvider>,
    ) -> Self {
        let trusts = validation
            .trust_domains
            .iter()
            .map(|(_, trust)| trust)
            .chain(&validation.trust);
        let hints = trusts
            .flat_map(|trust| trust.anchors.iter())
            .map(|anchor| DistinguishedName::in_sequence(&anchor.subject))
            .collect();
        Self {
            validation,
            required,
            hints,
            provider,
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(validation) = &self.validation {
            // The address 0.0.0.0 stands for no name at all, see `client::server_name`.
            let name = Some(server_name).filter(|name| **name != crate::client::no_name());
            validation.judge(end_entity, intermediates, Role::Server, name, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.validation
            .judge(end_entity, intermediates, Role::Client, None, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests;
