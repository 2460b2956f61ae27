//! What a certificate says, read once: for logs, headers, policies and `/certs`.

use std::{borrow::Cow, fmt::Write as _, net::IpAddr};

use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use x509_parser::{
    asn1_rs::{Oid, Tag},
    extensions::GeneralName,
    oid_registry as known,
    prelude::{FromDer, X509Certificate},
    x509::{AttributeTypeAndValue, X509Name},
};

/// A certificate and what it says.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    /// As it was sent.
    pub der: CertificateDer<'static>,
    /// Subject by RFC 2253: the last part first. May be empty, as a workload's is in a mesh.
    pub subject: Box<str>,
    /// Issuer by RFC 2253.
    pub issuer: Box<str>,
    /// Serial number, lower-case hex.
    pub serial: Box<str>,
    /// URI names.
    pub uris: Box<[Box<str>]>,
    /// DNS names.
    pub dns: Box<[Box<str>]>,
    /// E-mail addresses.
    pub emails: Box<[Box<str>]>,
    /// IP addresses.
    pub ips: Box<[IpAddr]>,
    /// Begin of validity, seconds since 1970.
    pub not_before: i64,
    /// End of validity, seconds since 1970.
    pub not_after: i64,
    /// SHA-256 of the whole certificate.
    pub sha256: [u8; 32],
    /// SHA-256 of the public key with its algorithm (SubjectPublicKeyInfo).
    pub spki_sha256: [u8; 32],
    /// May issue certificates.
    pub is_ca: bool,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate")
            .field("subject", &self.subject)
            .field("uris", &self.uris)
            .field("dns", &self.dns)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Certificate {
    /// Reads a certificate.
    ///
    /// # Errors
    /// What the reader stumbled over.
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, parsed) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        let mut uris = Vec::new();
        let mut dns = Vec::new();
        let mut emails = Vec::new();
        let mut ips = Vec::new();
        let names = parsed
            .subject_alternative_name()
            .map_err(|error| error.to_string())?;
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::URI(text) => uris.push(Box::from(*text)),
                GeneralName::DNSName(text) => dns.push(Box::from(*text)),
                GeneralName::RFC822Name(text) => emails.push(Box::from(*text)),
                GeneralName::IPAddress(bytes) => ips.extend(ip(bytes)),
                _ => {}
            }
        }
        Ok(Self {
            subject: rfc2253(parsed.subject()).into(),
            issuer: rfc2253(parsed.issuer()).into(),
            serial: serial(parsed.raw_serial()).into(),
            uris: uris.into(),
            dns: dns.into(),
            emails: emails.into(),
            ips: ips.into(),
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
            sha256: sha256(der),
            spki_sha256: sha256(parsed.public_key().raw),
            is_ca: parsed.is_ca(),
            der: der.clone().into_owned(),
        })
    }

    /// SHA-256 of the whole certificate, lower-case hex: `%DOWNSTREAM_PEER_FINGERPRINT_256%`, `Hash=` of XFCC.
    pub fn fingerprint(&self) -> String {
        hex(&self.sha256)
    }

    /// SHA-1 of the whole certificate, lower-case hex: `%DOWNSTREAM_PEER_FINGERPRINT_1%`.
    pub fn fingerprint_sha1(&self) -> String {
        let digest = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &self.der);
        hex(digest.as_ref())
    }

    /// The certificate in PEM.
    pub fn pem(&self) -> String {
        pem(&self.der)
    }

    /// The certificate in PEM, percent-encoded as Envoy puts it into headers and logs.
    pub fn url_encoded_pem(&self) -> String {
        url_encoded_pem(&self.der)
    }

    /// The first part of the subject of this type (`CN`, `O`), where it is text.
    pub fn subject_part(&self, name: &str) -> Option<String> {
        let (_, parsed) = X509Certificate::from_der(&self.der).ok()?;
        let subject = parsed.subject();
        let found = subject
            .iter_attributes()
            .find(|part| short_name(part.attr_type()) == Some(name))?;
        Some(text(found)?.into_owned())
    }
}

/// A certificate in PEM, percent-encoded as Envoy puts it into headers and logs.
pub fn url_encoded_pem(der: &[u8]) -> String {
    let pem = pem(der);
    let mut out = String::with_capacity(pem.len() + pem.len() / 4);
    for byte in pem.bytes() {
        match byte {
            b'\n' => out.push_str("%0A"),
            b' ' => out.push_str("%20"),
            b'+' => out.push_str("%2B"),
            b'/' => out.push_str("%2F"),
            b'=' => out.push_str("%3D"),
            byte => out.push(byte.into()),
        }
    }
    out
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

fn pem(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    // 48 bytes are a line of 64 characters.
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let bits = group
                .iter()
                .fold(0u32, |bits, byte| bits << 8 | u32::from(*byte))
                << (8 * (3 - group.len()));
            for position in 0..4 {
                match position <= group.len() {
                    true => {
                        out.push(ALPHABET[(bits >> (18 - 6 * position)) as usize & 63].into());
                    }
                    false => out.push('='),
                }
            }
        }
        out.push('\n');
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

/// Without the zero byte that only says that the number is positive.
fn serial(bytes: &[u8]) -> String {
    match bytes {
        [0, rest @ ..] if !rest.is_empty() => hex(rest),
        bytes => hex(bytes),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// RFC 2253 as OpenSSL writes it: the last part first, bytes beyond ASCII escaped.
fn rfc2253(name: &X509Name<'_>) -> String {
    let mut out = String::new();
    let parts: Vec<_> = name.iter_rdn().collect();
    for (index, part) in parts.iter().rev().enumerate() {
        if index > 0 {
            out.push(',');
        }
        for (index, attribute) in part.iter().enumerate() {
            if index > 0 {
                out.push('+');
            }
            match (short_name(attribute.attr_type()), text(attribute)) {
                (Some(name), Some(text)) => {
                    out.push_str(name);
                    out.push('=');
                    escape(&text, &mut out);
                }
                (name, _) => {
                    match name {
                        Some(name) => out.push_str(name),
                        None => out.push_str(&attribute.attr_type().to_id_string()),
                    }
                    out.push_str("=#");
                    out.push_str(&der_hex(attribute));
                }
            }
        }
    }
    out
}

fn escape(text: &str, out: &mut String) {
    let last = text.len();
    for (at, c) in text.char_indices() {
        let first = at == 0;
        let end = at + c.len_utf8() == last;
        match c {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => {
                out.push('\\');
                out.push(c);
            }
            '#' if first => out.push_str("\\#"),
            ' ' if first || end => out.push_str("\\ "),
            ' '..='~' => out.push(c),
            c => {
                let mut buffer = [0; 4];
                for byte in c.encode_utf8(&mut buffer).bytes() {
                    let _ = write!(out, "\\{byte:02X}");
                }
            }
        }
    }
}

/// The value as text, where it is of a type for text.
fn text<'a>(attribute: &'a AttributeTypeAndValue<'_>) -> Option<Cow<'a, str>> {
    let value = attribute.attr_value();
    match value.tag() {
        Tag::BmpString => {
            let units: Vec<u16> = value
                .data
                .chunks_exact(2)
                .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
                .collect();
            String::from_utf16(&units).ok().map(Cow::Owned)
        }
        Tag::T61String => Some(value.data.iter().map(|byte| char::from(*byte)).collect()),
        Tag::Utf8String
        | Tag::PrintableString
        | Tag::Ia5String
        | Tag::NumericString
        | Tag::VisibleString => std::str::from_utf8(value.data).ok().map(Cow::Borrowed),
        _ => None,
    }
}

/// The whole value with its tag and length, in hex.
fn der_hex(attribute: &AttributeTypeAndValue<'_>) -> String {
    use x509_parser::asn1_rs::ToDer;
    attribute
        .attr_value()
        .to_der_vec()
        .map(|der| hex(&der).to_ascii_uppercase())
        .unwrap_or_default()
}

/// OpenSSL's short names.
fn short_name(oid: &Oid<'_>) -> Option<&'static str> {
    let names = [
        (&known::OID_X509_COMMON_NAME, "CN"),
        (&known::OID_X509_ORGANIZATION_NAME, "O"),
        (&known::OID_X509_ORGANIZATIONAL_UNIT, "OU"),
        (&known::OID_X509_COUNTRY_NAME, "C"),
        (&known::OID_X509_STATE_OR_PROVINCE_NAME, "ST"),
        (&known::OID_X509_LOCALITY_NAME, "L"),
        (&known::OID_X509_STREET_ADDRESS, "street"),
        (&known::OID_X509_SERIALNUMBER, "serialNumber"),
        (&known::OID_X509_SURNAME, "SN"),
        (&known::OID_X509_GIVEN_NAME, "GN"),
        (&known::OID_X509_TITLE, "title"),
        (&known::OID_DOMAIN_COMPONENT, "DC"),
        (&known::OID_USERID, "UID"),
        (&known::OID_PKCS9_EMAIL_ADDRESS, "emailAddress"),
    ];
    names
        .iter()
        .find(|(known, _)| *known == oid)
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn a_certificate_says_who_it_is_for() {
        let mut params = CertificateParams::new(vec!["a.example".into()]).expect("a good name");
        params.subject_alt_names.push(SanType::URI(
            "spiffe://cluster.local/ns/default/sa/a"
                .try_into()
                .expect("ASCII"),
        ));
        params
            .subject_alt_names
            .push(SanType::IpAddress("10.0.0.1".parse().expect("an address")));
        params.distinguished_name.push(DnType::CountryName, "US");
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Lyft, Inc.");
        params
            .distinguished_name
            .push(DnType::CommonName, "Türe #1 ");
        params.serial_number = Some(vec![0xb1, 0x02].into());
        let key = KeyPair::generate().expect("keys can be made");
        let made = params.self_signed(&key).expect("it can be signed");
        let read = Certificate::read(made.der()).expect("it is a certificate");
        assert_eq!(
            &*read.subject, "O=Lyft\\, Inc.,C=US,CN=T\\C3\\BCre #1\\ ",
            "as `openssl x509 -nameopt RFC2253` writes it"
        );
        assert_eq!(&*read.serial, "b102");
        assert_eq!(&*read.dns, [Box::from("a.example")]);
        assert_eq!(
            &*read.uris,
            [Box::from("spiffe://cluster.local/ns/default/sa/a")]
        );
        assert_eq!(read.ips.len(), 1);
        assert_eq!(read.subject_part("O").as_deref(), Some("Lyft, Inc."));
        assert!(!read.is_ca);
        assert_eq!(pem(made.der()), made.pem().replace("\r\n", "\n"));
        assert!(
            read.url_encoded_pem()
                .starts_with("-----BEGIN%20CERTIFICATE-----%0AMII")
        );
    }

    #[test]
    fn garbage_is_not_a_certificate() {
        for bytes in [&b""[..], b"\x30", b"\x30\x82\xff\xff", &[0; 64]] {
            assert!(Certificate::read(&CertificateDer::from(bytes)).is_err());
        }
    }
}
