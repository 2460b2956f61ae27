//! The configuration of a client.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use base::clock::Clock;
use rustls::{
    ClientConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    sign::CertifiedKey,
};
use rustls_pki_types::ServerName;

use crate::{
    TlsError,
    identity::Identity,
    parameters::{Parameters, Time},
    verify::{ServerVerifier, Validation},
};

/// What a client is made of.
#[derive(Debug)]
pub struct ClientOptions {
    /// What may be negotiated.
    pub parameters: Parameters,
    /// Protocols to offer.
    pub alpn: Vec<Vec<u8>>,
    /// Server names whose sessions are kept; 0 keeps none.
    pub session_names: usize,
    /// By whose time certificates are judged.
    pub clock: Clock,
}

/// Builds a client. Without a validation it talks to everybody.
///
/// # Errors
/// What does not go together.
pub fn client(
    options: &ClientOptions,
    identity: Option<&Identity>,
    validation: Option<&Arc<Validation>>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = options.parameters.provider()?;
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&options.parameters.versions())
        .map_err(|error| TlsError::Parameters(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier {
            validation: validation.cloned(),
            provider,
        }));
    let mut config = match identity {
        Some(identity) => {
            builder.with_client_cert_resolver(Arc::new(Presented(identity.key.clone())))
        }
        None => builder.with_no_client_auth(),
    };
    config.time_provider = Arc::new(Time(options.clock.clone()));
    config.alpn_protocols.clone_from(&options.alpn);
    config.resumption = match options.session_names {
        0 => Resumption::disabled(),
        // rustls keeps up to eight sessions a name, and counts them all.
        names => Resumption::in_memory_sessions(names.saturating_mul(8)),
    };
    Ok(Arc::new(config))
}

/// The same client with another offer of protocols. Sessions are shared.
pub fn with_alpn(config: &ClientConfig, alpn: Vec<Vec<u8>>) -> Arc<ClientConfig> {
    let mut config = config.clone();
    config.alpn_protocols = alpn;
    Arc::new(config)
}

/// What is sent as server name. An empty text and an address send none.
///
/// # Errors
/// The text is not a name that TLS can carry (RFC 6066: a DNS name).
pub fn server_name(sni: &str) -> Result<ServerName<'static>, TlsError> {
    if sni.is_empty() {
        return Ok(no_name());
    }
    ServerName::try_from(sni.to_owned())
        .map_err(|_| TlsError::Parameters(format!("`{sni}` is not a name that TLS can carry")))
}

/// Whether nothing can be told or checked by this name.
pub fn is_no_name(name: &ServerName<'_>) -> bool {
    *name == no_name()
}

/// Stands for no name: rustls sends none for addresses.
pub(crate) fn no_name() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into())
}

/// Presents its certificate whatever authorities the server names, as BoringSSL does.
#[derive(Debug)]
struct Presented(Arc<CertifiedKey>);

impl ResolvesClientCert for Presented {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.0
            .key
            .choose_scheme(schemes)
            .is_some()
            .then(|| self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
