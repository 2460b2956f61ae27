//! What a handshake came to.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use rustls::{
    AlertDescription, CertificateError, CipherSuite, CommonState, Error, HandshakeKind,
    InvalidMessage, NamedGroup, PeerIncompatible, ProtocolVersion,
};
use rustls_pki_types::CertificateDer;

use crate::{
    certificate::Certificate,
    verify::{self, Issuer, Refusal, Validation},
};

/// An established session, in the words of logs and stats.
#[derive(Debug, Clone)]
pub struct Session {
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// OpenSSL's name of the suite.
    pub cipher: &'static str,
    /// The group of the key exchange.
    pub group: Option<&'static str>,
    /// The protocol that ALPN chose.
    pub alpn: Option<Arc<str>>,
    /// The server name that was asked for, lower case.
    pub server_name: Option<Arc<str>>,
    /// An earlier session was taken up again.
    pub resumed: bool,
    /// The peer's certificate.
    pub peer: Option<Arc<Certificate>>,
    /// Everything that the peer sent, its own certificate first.
    pub peer_chain: Arc<[CertificateDer<'static>]>,
    /// The peer's certificate leads to one that is trusted.
    pub peer_trusted: bool,
    /// The certificate that we presented.
    pub local: Option<Arc<Certificate>>,
    /// By what the peer was judged, where its issuer may be asked for.
    judge: Option<Arc<Validation>>,
    /// Who issued its certificate, once it was asked for.
    issuer: OnceLock<Option<Box<Issuer>>>,
}

impl Session {
    /// Reads a connection whose handshake is over. `local` is what was or could be presented; `trusted` says whether
    /// who is accepted is trusted as well.
    pub fn of(
        state: &CommonState,
        server_name: Option<Arc<str>>,
        local: Option<Arc<Certificate>>,
        trusted: bool,
    ) -> Self {
        let chain = state.peer_certificates().unwrap_or_default();
        let peer = chain.first().and_then(|der| Certificate::read(der).ok());
        Self {
            version: version(state.protocol_version()),
            cipher: state
                .negotiated_cipher_suite()
                .map_or("", |suite| cipher(suite.suite())),
            group: state
                .negotiated_key_exchange_group()
                .and_then(|group| group_name(group.name())),
            alpn: state
                .alpn_protocol()
                .map(|name| String::from_utf8_lossy(name).into()),
            server_name,
            resumed: state.handshake_kind() == Some(HandshakeKind::Resumed),
            peer_trusted: trusted && peer.is_some(),
            peer: peer.map(Arc::new),
            peer_chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
            local,
            judge: None,
            issuer: OnceLock::new(),
        }
    }

    /// By what the peer was judged: then its issuer can be told.
    pub fn judged_by(mut self, validation: Option<Arc<Validation>>) -> Self {
        self.judge = validation.filter(|_| self.peer.is_some());
        self
    }

    /// The verified issuer of the peer's certificate; it is looked for at the first question.
    pub fn peer_issuer(&self) -> Option<&Issuer> {
        let find = || self.judge.as_ref()?.issuer(&self.peer_chain).map(Box::new);
        self.issuer.get_or_init(find).as_deref()
    }
}

/// Which count a failed handshake belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// No certificate where one is required: `fail_verify_no_cert`.
    NoCertificate,
    /// No trusted chain: `fail_verify_error`.
    Chain,
    /// None of the names: `fail_verify_san`.
    Name,
    /// Not pinned: `fail_verify_cert_hash`.
    Pin,
    /// Everything else within TLS: `connection_error`.
    Protocol,
    /// The peer went away: counted nowhere in particular.
    Closed,
}

/// Why a handshake, or an established connection, failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Which count it belongs to.
    pub kind: FailureKind,
    /// For `%DOWNSTREAM_TRANSPORT_FAILURE_REASON%` and its upstream twin: BoringSSL's catchword, then what is wrong.
    pub reason: String,
}

impl Failure {
    /// Reads the error of a stream; `None` where the error is not of TLS.
    pub fn of(error: &io::Error) -> Option<Self> {
        if let Some(error) = error.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
            return Some(Self::of_tls(error));
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Some(Self {
                kind: FailureKind::Closed,
                reason: "TLS_error: the peer closed the connection during the handshake".to_owned(),
            }),
            _ => None,
        }
    }

    fn of_tls(error: &Error) -> Self {
        let (kind, catchword, text) = describe(error);
        Self {
            kind,
            reason: format!("TLS_error: {catchword}: {text}"),
        }
    }
}

fn describe(error: &Error) -> (FailureKind, &'static str, String) {
    use FailureKind as K;
    let protocol = |catchword, text: &str| (K::Protocol, catchword, text.to_owned());
    match error {
        Error::NoCertificatesPresented => (
            K::NoCertificate,
            "PEER_DID_NOT_RETURN_A_CERTIFICATE",
            "the client sent no certificate, and one is required".to_owned(),
        ),
        Error::InvalidCertificate(error) => {
            let refusal = match error {
                CertificateError::Other(other) => other.0.downcast_ref::<Refusal>(),
                _ => None,
            };
            let kind = match refusal {
                Some(Refusal::Name(_)) => K::Name,
                Some(Refusal::Pin { .. }) => K::Pin,
                _ => K::Chain,
            };
            let text = refusal.map_or_else(
                || format!("the certificate {}", verify::reason(error)),
                Refusal::to_string,
            );
            (kind, "CERTIFICATE_VERIFY_FAILED", text)
        }
        Error::NoApplicationProtocol => protocol(
            "NO_APPLICATION_PROTOCOL",
            "none of the protocols that were offered (ALPN) is spoken here",
        ),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => protocol(
            "WRONG_VERSION_NUMBER",
            "the peer does not speak TLS (plaintext on a TLS port?)",
        ),
        Error::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon) => {
            protocol("NO_SHARED_CIPHER", "no cipher suite in common")
        }
        Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon) => {
            protocol("NO_SHARED_GROUP", "no group for the key exchange in common")
        }
        Error::PeerIncompatible(
            PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::Tls13RequiredForQuic
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
        ) => protocol("UNSUPPORTED_PROTOCOL", "no version of TLS in common"),
        Error::PeerIncompatible(other) => (
            K::Protocol,
            "PEER_INCOMPATIBLE",
            format!("the peer cannot do what is needed ({other:?})"),
        ),
        Error::AlertReceived(alert) => (
            K::Protocol,
            alert_name(*alert),
            format!("the peer refused the connection (alert {alert:?})"),
        ),
        Error::DecryptError => {
            protocol("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "a record is broken")
        }
        other => (K::Protocol, "PROTOCOL_ERROR", other.to_string()),
    }
}

/// BoringSSL's words for the alerts that occur.
fn alert_name(alert: AlertDescription) -> &'static str {
    use AlertDescription as A;
    match alert {
        A::UnknownCA => "TLSV1_ALERT_UNKNOWN_CA",
        A::CertificateRequired => "TLSV1_ALERT_CERTIFICATE_REQUIRED",
        A::CertificateExpired => "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        A::CertificateUnknown => "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        A::CertificateRevoked => "SSLV3_ALERT_CERTIFICATE_REVOKED",
        A::BadCertificate => "SSLV3_ALERT_BAD_CERTIFICATE",
        A::HandshakeFailure => "SSLV3_ALERT_HANDSHAKE_FAILURE",
        A::ProtocolVersion => "TLSV1_ALERT_PROTOCOL_VERSION",
        A::NoApplicationProtocol => "TLSV1_ALERT_NO_APPLICATION_PROTOCOL",
        A::UnrecognisedName => "TLSV1_UNRECOGNIZED_NAME",
        A::AccessDenied => "TLSV1_ALERT_ACCESS_DENIED",
        A::DecryptError => "TLSV1_ALERT_DECRYPT_ERROR",
        _ => "TLSV1_ALERT",
    }
}

fn version(version: Option<ProtocolVersion>) -> &'static str {
    match version {
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
        _ => "",
    }
}

/// OpenSSL's names of the suites that rustls has.
pub fn cipher(suite: CipherSuite) -> &'static str {
    use CipherSuite as C;
    match suite {
        C::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
        C::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
        C::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
        C::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 => "ECDHE-ECDSA-AES128-GCM-SHA256",
        C::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 => "ECDHE-ECDSA-AES256-GCM-SHA384",
        C::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 => "ECDHE-ECDSA-CHACHA20-POLY1305",
        C::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => "ECDHE-RSA-AES128-GCM-SHA256",
        C::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => "ECDHE-RSA-AES256-GCM-SHA384",
        C::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => "ECDHE-RSA-CHACHA20-POLY1305",
        _ => "",
    }
}

/// The number of a suite that [`cipher`] has named.
pub fn cipher_number(name: &str) -> Option<u16> {
    Some(match name {
        "TLS_AES_128_GCM_SHA256" => 0x1301,
        "TLS_AES_256_GCM_SHA384" => 0x1302,
        "TLS_CHACHA20_POLY1305_SHA256" => 0x1303,
        "ECDHE-ECDSA-AES128-GCM-SHA256" => 0xc02b,
        "ECDHE-ECDSA-AES256-GCM-SHA384" => 0xc02c,
        "ECDHE-RSA-AES128-GCM-SHA256" => 0xc02f,
        "ECDHE-RSA-AES256-GCM-SHA384" => 0xc030,
        "ECDHE-RSA-CHACHA20-POLY1305" => 0xcca8,
        "ECDHE-ECDSA-CHACHA20-POLY1305" => 0xcca9,
        _ => return None,
    })
}

fn group_name(group: NamedGroup) -> Option<&'static str> {
    Some(match group {
        NamedGroup::X25519 => "X25519",
        NamedGroup::secp256r1 => "P-256",
        NamedGroup::secp384r1 => "P-384",
        NamedGroup::X25519MLKEM768 => "X25519MLKEM768",
        _ => return None,
    })
}
