//! What TLS says of a connection, for log lines and headers.

use std::time::{Duration, SystemTime};

use tls::{
    certificate::{Certificate, hex},
    session::Session,
};

use super::{format::Presence, time};
use crate::plan::format_tls::{CertificateValue, TlsValue};

/// Writes one value; nothing where the connection has no TLS or the certificate no such thing.
pub(super) fn write(session: Option<&Session>, value: &TlsValue, out: &mut Vec<u8>) -> Presence {
    let Some(session) = session else {
        return Presence::Absent;
    };
    match value {
        TlsValue::Version => text(session.version, out),
        TlsValue::Cipher => text(session.cipher, out),
        TlsValue::Group => text(session.group.unwrap_or_default(), out),
        TlsValue::ServerName => text(session.server_name.as_deref().unwrap_or_default(), out),
        TlsValue::SessionId => Presence::Absent,
        TlsValue::Peer(value) => match value {
            CertificateValue::ChainFingerprints256 => chain(session, Certificate::fingerprint, out),
            CertificateValue::ChainFingerprints1 => {
                chain(session, Certificate::fingerprint_sha1, out)
            }
            CertificateValue::ChainSerials => chain(session, |c| c.serial.to_string(), out),
            CertificateValue::IssuerFingerprint256 => match session.peer_issuer() {
                Some(issuer) => text(&hex(&issuer.sha256), out),
                None => Presence::Absent,
            },
            CertificateValue::IssuerSerial => match session.peer_issuer() {
                Some(issuer) => text(&issuer.serial, out),
                None => Presence::Absent,
            },
            value => certificate(session.peer.as_deref(), value, out),
        },
        TlsValue::Local(value) => certificate(session.local.as_deref(), value, out),
    }
}

fn certificate(
    certificate: Option<&Certificate>,
    value: &CertificateValue,
    out: &mut Vec<u8>,
) -> Presence {
    use CertificateValue as C;
    let Some(certificate) = certificate else {
        return Presence::Absent;
    };
    match value {
        C::Subject => text(&certificate.subject, out),
        C::Issuer => text(&certificate.issuer, out),
        C::Uri => joined(&certificate.uris, out),
        C::Dns => joined(&certificate.dns, out),
        C::Ip => joined(&certificate.ips, out),
        C::Email => joined(&certificate.emails, out),
        C::Serial => text(&certificate.serial, out),
        C::Fingerprint256 => text(&certificate.fingerprint(), out),
        C::Fingerprint1 => text(&certificate.fingerprint_sha1(), out),
        C::Pem => text(&certificate.url_encoded_pem(), out),
        C::From(format) => date(format, certificate.not_before, out),
        C::Until(format) => date(format, certificate.not_after, out),
        C::Other
        | C::IssuerFingerprint256
        | C::IssuerSerial
        | C::ChainFingerprints256
        | C::ChainFingerprints1
        | C::ChainSerials => Presence::Absent,
    }
}

fn chain(session: &Session, value: impl Fn(&Certificate) -> String, out: &mut Vec<u8>) -> Presence {
    // Read again: few formats ask for more than the first.
    let all: Vec<_> = session
        .peer_chain
        .iter()
        .filter_map(|der| Certificate::read(der).ok())
        .map(|certificate| value(&certificate))
        .collect();
    joined(&all, out)
}

fn date(format: &crate::plan::format::TimeFormat, seconds: i64, out: &mut Vec<u8>) -> Presence {
    let Ok(seconds) = u64::try_from(seconds) else {
        return Presence::Absent;
    };
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    time::write(format, at, out);
    Presence::Text
}

fn joined(all: &[impl ToString], out: &mut Vec<u8>) -> Presence {
    let all: Vec<_> = all.iter().map(ToString::to_string).collect();
    text(&all.join(","), out)
}

fn text(value: &str, out: &mut Vec<u8>) -> Presence {
    if value.is_empty() {
        return Presence::Absent;
    }
    out.extend_from_slice(value.as_bytes());
    Presence::Text
}
