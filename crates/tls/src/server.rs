//! The configuration of a server.

use std::sync::Arc;

use base::clock::Clock;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs::Ticketer,
    server::{
        ClientHello, NoServerSessionStorage, ServerSessionMemoryCache, WebPkiClientVerifier,
        danger::ClientCertVerifier,
    },
    sign::SingleCertAndKey,
};

use crate::{
    TlsError,
    identity::Identity,
    parameters::{Parameters, Time},
    verify::{ClientVerifier, Validation},
};

pub use rustls::server::ProducesTickets as Tickets;

/// What a server is made of.
#[derive(Debug)]
pub struct ServerOptions {
    /// What may be negotiated.
    pub parameters: Parameters,
    /// Protocols, the preferred first.
    pub alpn: Vec<Vec<u8>>,
    /// A client without a certificate is refused.
    pub require_client_certificate: bool,
    /// Seals session tickets; `None` issues none. Those who share it take each other's tickets, and a ticket vouches
    /// for a client's certificate: share it only among equal validations.
    pub tickets: Option<Arc<dyn Tickets>>,
    /// Without tickets, sessions are kept in memory.
    pub session_cache: bool,
    /// The client's order of cipher suites counts.
    pub prefer_client_ciphers: bool,
    /// By whose time certificates are judged.
    pub clock: Clock,
}

/// A server with one or more identities.
#[derive(Debug)]
pub struct Server {
    choices: Vec<Choice>,
}

/// What one client gets.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The identity.
    pub identity: Identity,
    /// For clients that offer one of our protocols, or none.
    pub config: Arc<ServerConfig>,
    /// For clients that offer only others: they get no answer to their offer and may go on, as with BoringSSL.
    without_alpn: Arc<ServerConfig>,
}

/// What seals tickets; its keys change by themselves.
///
/// # Errors
/// The system has no random numbers.
pub fn ticketer() -> Result<Arc<dyn Tickets>, TlsError> {
    Ticketer::new().map_err(|error| TlsError::Parameters(format!("session tickets: {error}")))
}

impl Server {
    /// Builds a server; there must be an identity.
    ///
    /// # Errors
    /// What does not go together.
    pub fn new(
        options: &ServerOptions,
        identities: &[Identity],
        validation: Option<&Arc<Validation>>,
    ) -> Result<Self, TlsError> {
        let provider = options.parameters.provider()?;
        let asks = validation.is_some_and(|validation| validation.asks());
        let verifier: Arc<dyn ClientCertVerifier> = if asks || options.require_client_certificate {
            let validation = validation.cloned().unwrap_or_default();
            let required = options.require_client_certificate;
            Arc::new(ClientVerifier::new(validation, required, provider.clone()))
        } else {
            WebPkiClientVerifier::no_client_auth()
        };
        let choices = identities
            .iter()
            .map(|identity| {
                let mut config = ServerConfig::builder_with_provider(provider.clone())
                    .with_protocol_versions(&options.parameters.versions())
                    .map_err(|error| TlsError::Parameters(error.to_string()))?
                    .with_client_cert_verifier(verifier.clone())
                    .with_cert_resolver(Arc::new(SingleCertAndKey::from((*identity.key).clone())));
                config.time_provider = Arc::new(Time(options.clock.clone()));
                config.ignore_client_order = !options.prefer_client_ciphers;
                config.session_storage = match (&options.tickets, options.session_cache) {
                    (None, true) => ServerSessionMemoryCache::new(SESSIONS),
                    _ => Arc::new(NoServerSessionStorage {}),
                };
                if let Some(tickets) = &options.tickets {
                    config.ticketer = tickets.clone();
                } else if !options.session_cache {
                    config.send_tls13_tickets = 0;
                }
                let without_alpn = Arc::new(config.clone());
                config.alpn_protocols.clone_from(&options.alpn);
                Ok(Choice {
                    identity: identity.clone(),
                    config: Arc::new(config),
                    without_alpn,
                })
            })
            .collect::<Result<Vec<_>, TlsError>>()?;
        if choices.is_empty() {
            return Err(TlsError::Parameters("a server needs a certificate".into()));
        }
        Ok(Self { choices })
    }

    /// The configuration for a client: by its server name, then by what its signatures allow, ECDSA first.
    pub fn choose(&self, hello: &ClientHello<'_>) -> (&Choice, Arc<ServerConfig>) {
        let choice = match &*self.choices {
            [only] => only,
            several => {
                let mut best = (&several[0], 0);
                for choice in several {
                    let score = score(&choice.identity, hello);
                    if score > best.1 {
                        best = (choice, score);
                    }
                }
                best.0
            }
        };
        let ours = &choice.config.alpn_protocols;
        let config = match hello.alpn() {
            Some(mut theirs) if !ours.is_empty() => {
                match theirs.any(|name| ours.iter().any(|own| own == name)) {
                    true => &choice.config,
                    false => &choice.without_alpn,
                }
            }
            _ => &choice.config,
        };
        (choice, config.clone())
    }

    /// Every identity.
    pub fn identities(&self) -> impl Iterator<Item = &Identity> {
        self.choices.iter().map(|choice| &choice.identity)
    }
}

/// How well an identity fits a client.
fn score(identity: &Identity, hello: &ClientHello<'_>) -> u32 {
    let leaf = identity.leaf();
    let name = hello.server_name().unwrap_or_default();
    let cn = leaf
        .dns
        .is_empty()
        .then(|| leaf.subject_part("CN"))
        .flatten();
    let mut names = leaf.dns.iter().map(|name| &**name).chain(cn.as_deref());
    let named = names
        .by_ref()
        .map(|own| {
            let wild = own.strip_prefix("*.").is_some_and(|suffix| {
                name.split_once('.')
                    .is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(suffix))
            });
            match own.eq_ignore_ascii_case(name) {
                true => 2,
                false => u32::from(wild),
            }
        })
        .max()
        .unwrap_or(0);
    let key = &identity.key.key;
    let signs = key.choose_scheme(hello.signature_schemes()).is_some();
    let short = key.algorithm() != rustls::SignatureAlgorithm::RSA;
    u32::from(signs) * 100 + named * 10 + u32::from(short)
}

/// Sessions kept in memory where tickets are switched off.
const SESSIONS: usize = 1024;
