//! The client side: handshakes with hosts.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
};

use base::clock::Clock;
use rustls::ClientConfig;
use tls::{
    certificate::Certificate,
    client::{ClientOptions, client, is_no_name, server_name, with_alpn},
    session::Session,
};
use tokio_rustls::TlsConnector;

use super::{
    HandshakeError, Material,
    context::{Parts, alpn, parameters},
    stats::SslStats,
};
use crate::{cluster::shared::ProcessShared, io::Stream, plan::tls::UpstreamTls};

/// The name that a request chooses for its connection (`auto_sni`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AutoName<'a> {
    /// A DNS name, or an address, which is not sent.
    pub name: &'a str,
    /// The peer's certificate must be valid for it.
    pub checked: bool,
}

/// What a connection asks for beyond its cluster's context.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Offer<'a> {
    /// Protocols to offer instead of the context's.
    pub(crate) alpn: Option<&'a [Arc<str>]>,
    /// Offer HTTP/2 and HTTP/1.1 where neither the caller nor the context offers anything.
    pub(crate) http: bool,
    /// Name of the host, for `auto_host_sni`.
    pub(crate) hostname: &'a str,
    /// The name that the request chooses, before all others.
    pub(crate) auto_name: Option<AutoName<'a>>,
}

/// The TLS contexts of a cluster in one worker: mostly one, more with `transport_socket_matches`.
#[derive(Debug)]
pub(crate) struct Upstreams {
    shared: Arc<ProcessShared>,
    scope: stats::Scope,
    stats: SslStats,
    contexts: RefCell<Vec<Rc<Context>>>,
}

#[derive(Debug)]
struct Context {
    plan: Arc<UpstreamTls>,
    /// The peer's certificate must be valid for the name that is asked for.
    checks_name: bool,
    generation: Cell<u64>,
    materials: Vec<Arc<Material>>,
    config: Arc<ClientConfig>,
    /// The same with other protocols.
    variants: RefCell<Vec<Variant>>,
    local: Option<Arc<Certificate>>,
    trusts: bool,
    /// The server's certificate must be good now.
    expires: bool,
    /// Until when its sessions can be taken up again, in seconds since 1970. That judges no certificate anew, so none is
    /// taken up once a certificate of either end that it began with has ended: the handshake that is made in its place
    /// says what is wrong, or meets newer certificates.
    sessions_until: Cell<i64>,
}

/// Protocols to offer, and the client that offers them.
type Variant = (Vec<Vec<u8>>, Arc<ClientConfig>);

impl Upstreams {
    /// `scope` is the cluster's.
    pub(crate) fn new(shared: Arc<ProcessShared>, scope: &stats::Scope) -> Self {
        Self {
            shared,
            scope: scope.clone(),
            stats: SslStats::below(scope),
            contexts: RefCell::default(),
        }
    }

    /// Makes the handshake. What it comes to is counted here. The caller limits the time.
    pub(crate) async fn connect(
        &self,
        plan: &Arc<UpstreamTls>,
        offer: Offer<'_>,
        stream: Stream,
    ) -> Result<Stream, HandshakeError> {
        let result = self.handshake(plan, offer, stream).await;
        match &result {
            Ok(stream) => {
                if let Some(session) = stream.session() {
                    self.stats.established(session);
                }
            }
            Err(error) => self.stats.failed(error),
        }
        result
    }

    /// What Istio's metadata exchange says of this workload.
    pub(crate) fn own(&self) -> &[u8] {
        &self.shared.peer_metadata
    }

    /// Whether a handshake could be made now; counts it where not.
    pub(crate) fn ready(
        &self,
        plan: &Arc<UpstreamTls>,
        auto_name: Option<AutoName<'_>>,
    ) -> Result<(), HandshakeError> {
        let checks_name = auto_name.is_some_and(|auto| auto.checked);
        self.current(plan, checks_name)
            .map(|_| ())
            .inspect_err(|_| {
                let name = "client_ssl_socket_factory.upstream_context_secrets_not_ready";
                self.scope.counter(name).inc();
            })
    }

    async fn handshake(
        &self,
        plan: &Arc<UpstreamTls>,
        offer: Offer<'_>,
        stream: Stream,
    ) -> Result<Stream, HandshakeError> {
        let checks_name = offer.auto_name.is_some_and(|auto| auto.checked);
        let context = self.current(plan, checks_name)?;
        let sni = match offer.auto_name {
            Some(auto) => auto.name,
            None if plan.auto_host_sni && !offer.hostname.is_empty() => offer.hostname,
            None => &*plan.sni,
        };
        let name = server_name(sni).map_err(|error| HandshakeError::Context(error.to_string()))?;
        if checks_name && is_no_name(&name) {
            let error = format!("auto_san_validation: the request's host `{sni}` is no name");
            return Err(HandshakeError::Context(error));
        }
        let config = match offer.alpn {
            Some(names) => context.variant(alpn(names)),
            None if offer.http && plan.common.alpn.is_empty() => {
                context.variant(vec![b"h2".to_vec(), b"http/1.1".to_vec()])
            }
            None => context.config.clone(),
        };
        let stream = TlsConnector::from(config).connect(name, stream).await?;
        let sni = (!sni.is_empty()).then(|| sni.to_ascii_lowercase().into());
        let local = context.local.clone();
        let session = Session::of(stream.get_ref().1, sni, local, context.trusts);
        if let Some(peer) = session.peer.as_ref().filter(|_| context.expires) {
            let until = context.sessions_until.get().min(peer.not_after);
            context.sessions_until.set(until);
        }
        Ok(Stream::with_tls(stream.into(), session))
    }

    fn current(
        &self,
        plan: &Arc<UpstreamTls>,
        checks_name: bool,
    ) -> Result<Rc<Context>, HandshakeError> {
        let secrets = &self.shared.secrets;
        let generation = secrets.generation();
        let mut contexts = self.contexts.borrow_mut();
        let at = contexts
            .iter()
            .position(|c| Arc::ptr_eq(&c.plan, plan) && c.checks_name == checks_name);
        let held = at.map(|at| contexts[at].clone());
        let now = i64::try_from(secrets.clock.seconds()).unwrap_or(i64::MAX);
        let lasts = |context: &Context| now < context.sessions_until.get();
        if let Some(context) = held
            .as_ref()
            .filter(|c| c.generation.get() == generation && lasts(c))
        {
            return Ok(context.clone());
        }
        let parts = match Parts::gather(&plan.common, secrets) {
            Ok(parts) => parts,
            Err(error) => return held.ok_or(error),
        };
        if let Some(context) = held.filter(|c| parts.same(&c.materials) && lasts(c)) {
            context.generation.set(generation);
            return Ok(context);
        }
        let context = Rc::new(Context::new(
            plan,
            checks_name,
            parts,
            generation,
            secrets.clock.clone(),
        )?);
        match at {
            Some(at) => contexts[at] = context.clone(),
            None => contexts.push(context.clone()),
        }
        Ok(context)
    }
}

impl Context {
    fn new(
        plan: &Arc<UpstreamTls>,
        checks_name: bool,
        parts: Parts,
        generation: u64,
        clock: Clock,
    ) -> Result<Self, HandshakeError> {
        let identity = parts.identities.first();
        let own_until = identity.map_or(i64::MAX, |identity| identity.leaf().not_after);
        let expired = own_until <= i64::try_from(clock.seconds()).unwrap_or(i64::MAX);
        let options = ClientOptions {
            parameters: parameters(&plan.common),
            alpn: alpn(&plan.common.alpn),
            session_names: match (plan.max_session_keys, plan.auto_host_sni || checks_name) {
                (0, _) => 0,
                // Whom we cannot prove ourselves to is not to be met by an older proof.
                _ if expired => 0,
                (_, false) => 1,
                // A name for each host.
                (_, true) => 64,
            },
            clock,
        };
        let mut validation = parts.validation;
        if plan.auto_sni_san_validation || checks_name {
            validation.get_or_insert_default().server_name = true;
        }
        let trusts = validation.as_ref().is_some_and(|validation| {
            !validation.accept_untrusted
                && (validation.trust.is_some() || !validation.trust_domains.is_empty())
        });
        let expires = validation.as_ref().is_some_and(|v| !v.allow_expired) && trusts;
        let config = client(&options, identity, validation.map(Arc::new).as_ref())
            .map_err(|error| HandshakeError::Context(error.to_string()))?;
        Ok(Self {
            plan: plan.clone(),
            checks_name,
            generation: generation.into(),
            local: identity.map(|identity| identity.leaf().clone()),
            materials: parts.materials,
            config,
            variants: RefCell::default(),
            trusts,
            expires,
            sessions_until: Cell::new(match expired {
                true => i64::MAX,
                false => own_until,
            }),
        })
    }

    fn variant(&self, alpn: Vec<Vec<u8>>) -> Arc<ClientConfig> {
        let mut variants = self.variants.borrow_mut();
        if let Some((_, config)) = variants.iter().find(|(names, _)| *names == alpn) {
            return config.clone();
        }
        let config = with_alpn(&self.config, alpn.clone());
        variants.push((alpn, config.clone()));
        config
    }
}
