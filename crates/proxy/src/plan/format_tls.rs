//! `%DOWNSTREAM_TLS_…%`, `%UPSTREAM_PEER_…%` and the like: what TLS says of a connection.

use super::format::TimeFormat;

/// One value of one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsOperator {
    /// Of the connection to the host; else of the client's.
    pub upstream: bool,
    /// Which value.
    pub value: TlsValue,
}

/// What TLS says of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsValue {
    /// `TLSv1.3`.
    Version,
    /// OpenSSL's name.
    Cipher,
    /// The group of the key exchange.
    Group,
    /// The server name of the handshake.
    ServerName,
    /// The session's id. The library keeps it for itself, so there is none.
    SessionId,
    /// Of the peer's certificate.
    Peer(CertificateValue),
    /// Of ours.
    Local(CertificateValue),
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateValue {
    /// Subject by RFC 2253.
    Subject,
    /// Issuer by RFC 2253.
    Issuer,
    /// URI names, joined by commas.
    Uri,
    /// DNS names.
    Dns,
    /// IP addresses.
    Ip,
    /// E-mail addresses.
    Email,
    /// Names of other kinds: none is read.
    Other,
    /// Serial number in hex.
    Serial,
    /// SHA-256 in hex.
    Fingerprint256,
    /// SHA-256 of the certificate that verified it, in hex.
    IssuerFingerprint256,
    /// Serial number of the certificate that verified it.
    IssuerSerial,
    /// SHA-1 in hex.
    Fingerprint1,
    /// PEM, percent-encoded.
    Pem,
    /// Begin of validity.
    From(TimeFormat),
    /// End of validity.
    Until(TimeFormat),
    /// Of all certificates that the peer sent, joined by commas.
    ChainFingerprints256,
    /// Of all certificates that the peer sent.
    ChainFingerprints1,
    /// Of all certificates that the peer sent.
    ChainSerials,
}

impl TlsOperator {
    /// The operator of this name, which takes the argument only where it is a time; `None` where it is another one.
    pub(super) fn named(name: &str, time: impl Fn() -> TimeFormat) -> Option<Self> {
        use CertificateValue as C;
        let (upstream, rest) = match name.strip_prefix("DOWNSTREAM_") {
            Some(rest) => (false, rest),
            None => (true, name.strip_prefix("UPSTREAM_")?),
        };
        let value = match rest {
            "TLS_VERSION" => TlsValue::Version,
            "TLS_CIPHER" => TlsValue::Cipher,
            "TLS_GROUP" => TlsValue::Group,
            "SERVER_NAME" if upstream => TlsValue::ServerName,
            "TLS_SESSION_ID" => TlsValue::SessionId,
            _ => {
                let (peer, field) = match rest.strip_prefix("PEER_") {
                    Some(field) => (true, field),
                    None => (false, rest.strip_prefix("LOCAL_")?),
                };
                let field = match (field, peer) {
                    ("SUBJECT", _) => C::Subject,
                    ("URI_SAN", _) => C::Uri,
                    ("DNS_SAN", _) => C::Dns,
                    ("IP_SAN", _) => C::Ip,
                    ("EMAIL_SAN", _) => C::Email,
                    ("OTHERNAME_SAN", _) => C::Other,
                    ("ISSUER", true) => C::Issuer,
                    ("SERIAL", true) => C::Serial,
                    ("FINGERPRINT_256", true) => C::Fingerprint256,
                    ("FINGERPRINT_1", true) => C::Fingerprint1,
                    ("CERT", true) => C::Pem,
                    ("CERT_V_START", true) => C::From(time()),
                    ("CERT_V_END", true) => C::Until(time()),
                    ("ISSUER_FINGERPRINT_256", true) if !upstream => C::IssuerFingerprint256,
                    ("ISSUER_SERIAL", true) if !upstream => C::IssuerSerial,
                    ("CHAIN_FINGERPRINTS_256", true) => C::ChainFingerprints256,
                    ("CHAIN_FINGERPRINTS_1", true) => C::ChainFingerprints1,
                    ("CHAIN_SERIALS", true) => C::ChainSerials,
                    _ => return None,
                };
                match peer {
                    true => TlsValue::Peer(field),
                    false => TlsValue::Local(field),
                }
            }
        };
        Some(Self { upstream, value })
    }
}

impl TlsValue {
    /// Whether the operator may have a time format.
    pub(super) fn takes_argument(&self) -> bool {
        use CertificateValue as C;
        matches!(
            self,
            Self::Peer(C::From(_) | C::Until(_)) | Self::Local(C::From(_) | C::Until(_))
        )
    }
}
