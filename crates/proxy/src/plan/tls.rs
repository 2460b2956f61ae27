//! TLS contexts: planned in full, so that what is wrong in one is found with the rest of the resource.

use std::sync::Arc;

use bytes::Bytes;

use super::{bootstrap::ConfigSource, matcher::StringMatcher};

/// `DownstreamTlsContext`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownstreamTls {
    /// What both sides share.
    pub common: CommonTls,
    /// A client without a valid certificate is refused.
    pub require_client_certificate: bool,
    /// A client without SNI is refused.
    pub require_sni: bool,
    /// Session tickets are not issued.
    pub disable_stateless_session_resumption: bool,
    /// No session cache.
    pub disable_stateful_session_resumption: bool,
    /// Our order of ciphers wins.
    pub prefer_client_ciphers: bool,
}

/// `UpstreamTlsContext`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamTls {
    /// What both sides share.
    pub common: CommonTls,
    /// Server name to send; empty sends none.
    pub sni: Arc<str>,
    /// SNI is the endpoint's host name.
    pub auto_host_sni: bool,
    /// The peer's certificate must be valid for the SNI.
    pub auto_sni_san_validation: bool,
    /// Sessions kept for resumption. Default 1.
    pub max_session_keys: u32,
}

/// `CommonTlsContext`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommonTls {
    /// Lowest version; the side's default when absent (server 1.2, client 1.2).
    pub min_version: Option<TlsVersion>,
    /// Highest version; 1.3 when absent.
    pub max_version: Option<TlsVersion>,
    /// TLS 1.2 suites in order, as rustls knows them; empty: its defaults. Names it lacks were dropped.
    pub cipher_suites: Vec<CipherSuite>,
    /// Groups in order; empty: defaults.
    pub curves: Vec<Curve>,
    /// Protocols offered or taken.
    pub alpn: Vec<Arc<str>>,
    /// Own certificates.
    pub certificates: Vec<CertificateSource>,
    /// How the peer's certificate is judged.
    pub validation: Option<Validation>,
}

/// TLS versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// 1.2.
    V1_2,
    /// 1.3.
    V1_3,
}

/// TLS 1.2 suites that rustls has, by their OpenSSL names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CipherSuite {
    /// ECDHE-ECDSA-AES128-GCM-SHA256.
    EcdheEcdsaAes128Gcm,
    /// ECDHE-ECDSA-AES256-GCM-SHA384.
    EcdheEcdsaAes256Gcm,
    /// ECDHE-ECDSA-CHACHA20-POLY1305.
    EcdheEcdsaChacha20,
    /// ECDHE-RSA-AES128-GCM-SHA256.
    EcdheRsaAes128Gcm,
    /// ECDHE-RSA-AES256-GCM-SHA384.
    EcdheRsaAes256Gcm,
    /// ECDHE-RSA-CHACHA20-POLY1305.
    EcdheRsaChacha20,
}

/// Key exchange groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// X25519.
    X25519,
    /// P-256.
    P256,
    /// P-384.
    P384,
    /// X25519MLKEM768.
    X25519MlKem768,
}

/// Where a certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateSource {
    /// Part of the configuration.
    Inline {
        /// PEM chain, leaf first.
        chain: DataSource,
        /// PEM key.
        key: DataSource,
    },
    /// From SDS.
    Sds(SdsSecret),
}

/// A secret to ask SDS for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SdsSecret {
    /// Its name.
    pub name: Arc<str>,
    /// Where it is asked for; `None`: among the bootstrap's static secrets.
    pub source: Option<ConfigSource>,
}

/// Bytes given in place or in a file. The plan reads no files.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DataSource {
    /// In place.
    Inline(Bytes),
    /// In a file.
    File(std::path::PathBuf),
    /// In an environment variable.
    Environment(Arc<str>),
}

/// How the peer's certificate is judged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Validation {
    /// Authorities in the configuration.
    pub trusted_ca: Option<DataSource>,
    /// Authorities (and more) from SDS; merged over the rest.
    pub sds: Option<SdsSecret>,
    /// One of these must fit a subject alternative name; empty: any.
    pub match_sans: Vec<SanMatcher>,
    /// Revocation lists.
    pub crl: Option<DataSource>,
    /// SHA-256 of the public key; empty: any.
    pub spki_pins: Vec<[u8; 32]>,
    /// SHA-256 of the certificate; empty: any.
    pub certificate_hashes: Vec<[u8; 32]>,
    /// Expired certificates pass.
    pub allow_expired: bool,
    /// Certificates that no authority vouches for pass.
    pub accept_untrusted: bool,
    /// Revocation of the leaf only.
    pub only_verify_leaf_crl: bool,
    /// Authorities by SPIFFE trust domain (`envoy.tls.cert_validator.spiffe`); they replace `trusted_ca`.
    pub trust_domains: Vec<(Arc<str>, DataSource)>,
}

/// Condition on one subject alternative name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SanMatcher {
    /// Which kind of name; `Any` is the deprecated untyped form.
    pub kind: SanKind,
    /// Condition on its text.
    pub matcher: StringMatcher,
}

/// Kinds of subject alternative names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SanKind {
    /// Any kind.
    Any,
    /// E-mail.
    Email,
    /// DNS name.
    Dns,
    /// URI.
    Uri,
    /// IP address.
    Ip,
}

/// A secret as SDS or the bootstrap gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Its name.
    pub name: Arc<str>,
    /// What it is.
    pub kind: SecretKind,
}

/// What a secret is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretKind {
    /// Own certificate.
    Certificate {
        /// PEM chain, leaf first.
        chain: DataSource,
        /// PEM key.
        key: DataSource,
    },
    /// How the peer's certificate is judged.
    Validation(Validation),
    /// Any text.
    Generic(DataSource),
}
