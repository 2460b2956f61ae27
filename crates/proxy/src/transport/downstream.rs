//! The server side: handshakes with clients.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::server::Acceptor;
use tls::{
    server::{Server, ServerOptions},
    session::{Failure, FailureKind, Session},
    verify::Validation,
};
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;

use super::{
    HandshakeError, Material, Secrets,
    context::{Parts, alpn, parameters},
    stats::SslStats,
};
use crate::{io::Stream, plan::tls::DownstreamTls};

/// The TLS context of a filter chain in one worker.
#[derive(Debug)]
pub(crate) struct Downstream {
    plan: Arc<DownstreamTls>,
    secrets: Arc<Secrets>,
    scope: stats::Scope,
    stats: SslStats,
    built: RefCell<Option<Rc<Built>>>,
    /// When the log last said something.
    told: Cell<Option<Instant>>,
}

#[derive(Debug)]
struct Built {
    generation: Cell<u64>,
    materials: Vec<Arc<Material>>,
    server: Server,
    /// By what clients are judged.
    validation: Option<Arc<Validation>>,
    /// Who is accepted is trusted.
    trusts: bool,
    /// A client's certificate must be good now.
    expires: bool,
}

impl Downstream {
    /// `scope` is the listener's.
    pub(crate) fn new(
        plan: Arc<DownstreamTls>,
        secrets: Arc<Secrets>,
        scope: &stats::Scope,
    ) -> Self {
        Self {
            plan,
            secrets,
            scope: scope.clone(),
            stats: SslStats::below(scope),
            built: RefCell::default(),
            told: Cell::default(),
        }
    }

    /// Makes the handshake, within `limit`. What it comes to is counted here.
    pub(crate) async fn accept(
        &self,
        stream: Stream,
        limit: Option<Duration>,
    ) -> Result<Stream, HandshakeError> {
        let shake = self.handshake(stream);
        let result = timeout(limit.unwrap_or(HANDSHAKE_LIMIT), shake)
            .await
            .unwrap_or(Err(HandshakeError::Timeout));
        match &result {
            Ok(stream) => {
                if let Some(session) = stream.session() {
                    self.stats.established(session);
                }
            }
            Err(HandshakeError::NotReady(_) | HandshakeError::Context(_)) => {
                let name = "server_ssl_socket_factory.downstream_context_secrets_not_ready";
                self.scope.counter(name).inc();
            }
            Err(error) => self.stats.failed(error),
        }
        result
    }

    /// Tells why a handshake failed: in the stats always, in the log once a second.
    pub(crate) fn tell(&self, error: &HandshakeError, peer: Option<SocketAddr>) {
        let listener = self.scope.prefix().trim_end_matches('.');
        let peer = peer.map(|peer| peer.to_string()).unwrap_or_default();
        self.scope
            .stats()
            .text(&format!("{listener}.ssl.last_failure"))
            .set(&format!("{peer}: {error}"));
        let now = Instant::now();
        if self
            .told
            .get()
            .is_none_or(|told| now - told >= Duration::from_secs(1))
        {
            self.told.set(Some(now));
            tracing::warn!(listener, peer, "no TLS session: {error}");
        } else {
            tracing::debug!(listener, peer, "no TLS session: {error}");
        }
    }

    async fn handshake(&self, stream: Stream) -> Result<Stream, HandshakeError> {
        let built = self.current()?;
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let hello = start.client_hello();
        let name: Option<Arc<str>> = hello
            .server_name()
            .map(|name| name.to_ascii_lowercase().into());
        if self.plan.require_sni && name.is_none() {
            return Err(HandshakeError::Failed(Failure {
                kind: FailureKind::Protocol,
                reason: "TLS_error: MISSING_EXTENSION: the client sent no server name (SNI), and one is required".to_owned(),
            }));
        }
        let (choice, config) = built.server.choose(&hello);
        let stream = start.into_stream(config).await?;
        let local = Some(choice.identity.leaf().clone());
        let session = Session::of(stream.get_ref().1, name, local, built.trusts)
            .judged_by(built.validation.clone());
        // A session that is taken up again judges no certificate: the one that it began with may have ended since.
        // Clients with a newer one begin anew, so that none that is good comes here.
        let until = session.peer.as_ref().map(|peer| peer.not_after);
        let now = i64::try_from(self.secrets.clock.seconds()).unwrap_or(i64::MAX);
        if session.resumed && built.expires && until.is_some_and(|until| until <= now) {
            return Err(HandshakeError::Failed(Failure {
                kind: FailureKind::Chain,
                reason: "TLS_error: CERTIFICATE_VERIFY_FAILED: the certificate of the resumed session has expired"
                    .to_owned(),
            }));
        }
        Ok(Stream::with_tls(stream.into(), session))
    }

    /// The context with the secrets of now.
    fn current(&self) -> Result<Rc<Built>, HandshakeError> {
        let generation = self.secrets.generation();
        let held = self.built.borrow().clone();
        if let Some(built) = held.as_ref().filter(|b| b.generation.get() == generation) {
            return Ok(built.clone());
        }
        let parts = match Parts::gather(&self.plan.common, &self.secrets) {
            Ok(parts) => parts,
            // A secret that was taken away does not stop what works.
            Err(error) => return held.ok_or(error),
        };
        if let Some(built) = held.filter(|built| parts.same(&built.materials)) {
            built.generation.set(generation);
            return Ok(built);
        }
        let built = Rc::new(self.build(parts, generation)?);
        *self.built.borrow_mut() = Some(built.clone());
        Ok(built)
    }

    fn build(&self, parts: Parts, generation: u64) -> Result<Built, HandshakeError> {
        let plan = &self.plan;
        let tickets = match plan.disable_stateless_session_resumption {
            true => None,
            false => Some(
                self.secrets
                    .tickets(self.digest(&parts))
                    .map_err(HandshakeError::Context)?,
            ),
        };
        let options = ServerOptions {
            parameters: parameters(&plan.common),
            alpn: alpn(&plan.common.alpn),
            require_client_certificate: plan.require_client_certificate,
            tickets,
            session_cache: !plan.disable_stateful_session_resumption,
            prefer_client_ciphers: plan.prefer_client_ciphers,
            clock: self.secrets.clock.clone(),
        };
        let validation = parts.validation.map(Arc::new);
        let trusts = validation.as_ref().is_some_and(|validation| {
            !validation.accept_untrusted
                && (validation.trust.is_some() || !validation.trust_domains.is_empty())
        });
        let expires = validation
            .as_ref()
            .is_some_and(|v| v.asks() && !v.allow_expired);
        let server = Server::new(&options, &parts.identities, validation.as_ref())
            .map_err(|error| HandshakeError::Context(error.to_string()))?;
        Ok(Built {
            generation: generation.into(),
            materials: parts.materials,
            server,
            validation,
            trusts,
            expires,
        })
    }

    /// What a ticket vouches for: whom we are, and that the client was accepted. It does not change with a renewed
    /// certificate.
    fn digest(&self, parts: &Parts) -> [u8; 32] {
        let mut text = parts.fingerprint.clone();
        text.push(self.plan.require_client_certificate.into());
        for identity in &parts.identities {
            let leaf = identity.leaf();
            let names = (
                &leaf.subject,
                &leaf.issuer,
                &leaf.uris,
                &leaf.dns,
                &leaf.ips,
            );
            text.extend(format!("{names:?}").into_bytes());
        }
        tls::certificate::sha256(&text)
    }
}

/// How long a handshake may take where nothing is configured. Envoy has no limit.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(60);
