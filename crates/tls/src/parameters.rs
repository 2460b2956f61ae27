//! Versions, cipher suites and groups.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use base::clock::Clock;
use rustls::{
    CipherSuite, NamedGroup, ProtocolVersion, SupportedCipherSuite, SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    time_provider::TimeProvider,
    version::{TLS12, TLS13},
};
use rustls_pki_types::UnixTime;

use crate::TlsError;

/// What may be negotiated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters {
    /// 1.2 is not offered.
    pub no_tls12: bool,
    /// 1.3 is not offered.
    pub no_tls13: bool,
    /// Suites of 1.2 in order; empty: all. The suites of 1.3 are not configurable, as in BoringSSL.
    pub cipher_suites: Vec<CipherSuite>,
    /// Groups in order; empty: X25519, P-256, P-384, X25519MLKEM768.
    pub groups: Vec<NamedGroup>,
}

impl Parameters {
    /// The versions, highest first.
    pub(crate) fn versions(&self) -> Vec<&'static SupportedProtocolVersion> {
        let mut versions = Vec::with_capacity(2);
        if !self.no_tls13 {
            versions.push(&TLS13);
        }
        if !self.no_tls12 {
            versions.push(&TLS12);
        }
        versions
    }

    /// What computes with these suites and groups.
    pub(crate) fn provider(&self) -> Result<Arc<CryptoProvider>, TlsError> {
        if self.cipher_suites.is_empty() && self.groups.is_empty() {
            return Ok(default_provider());
        }
        let base = default_provider();
        let mut provider = (*base).clone();
        if !self.cipher_suites.is_empty() {
            provider
                .cipher_suites
                .retain(|suite| matches!(suite, SupportedCipherSuite::Tls13(_)));
            for name in &self.cipher_suites {
                let found = base
                    .cipher_suites
                    .iter()
                    .find(|suite| suite.suite() == *name);
                provider.cipher_suites.extend(found);
            }
        }
        if !self.groups.is_empty() {
            provider.kx_groups = self
                .groups
                .iter()
                .filter_map(|name| {
                    base.kx_groups
                        .iter()
                        .find(|group| group.name() == *name)
                        .copied()
                })
                .collect();
        }
        let none_of_12 = self.no_tls13
            && !provider
                .cipher_suites
                .iter()
                .any(|suite| suite.version().version == ProtocolVersion::TLSv1_2);
        if none_of_12 || provider.kx_groups.is_empty() {
            return Err(TlsError::Parameters(
                "no cipher suite or no group is left for the versions that are allowed".to_owned(),
            ));
        }
        Ok(Arc::new(provider))
    }
}

/// Suites of 1.3 in BoringSSL's order where the processor has AES; the groups that cost least first.
pub(crate) fn default_provider() -> Arc<CryptoProvider> {
    static DEFAULT: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    DEFAULT
        .get_or_init(|| {
            use aws_lc_rs::{cipher_suite as suite, kx_group as group};
            Arc::new(CryptoProvider {
                cipher_suites: vec![
                    suite::TLS13_AES_128_GCM_SHA256,
                    suite::TLS13_AES_256_GCM_SHA384,
                    suite::TLS13_CHACHA20_POLY1305_SHA256,
                    suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
                    suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
                    suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
                    suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
                    suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
                    suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
                ],
                kx_groups: vec![
                    group::X25519,
                    group::SECP256R1,
                    group::SECP384R1,
                    group::X25519MLKEM768,
                ],
                ..aws_lc_rs::default_provider()
            })
        })
        .clone()
}

/// Lets rustls ask our clock.
#[derive(Debug)]
pub struct Time(pub Clock);

impl TimeProvider for Time {
    fn current_time(&self) -> Option<UnixTime> {
        let since = Duration::from_secs(self.0.seconds());
        Some(UnixTime::since_unix_epoch(since))
    }
}
