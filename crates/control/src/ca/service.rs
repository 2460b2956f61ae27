//! `istio.v1.auth.IstioCertificateService`: certificates for callers who have proven who they are.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base::{clock::Clock, spiffe::Identity};
use parking_lot::Mutex;
use proto::istio::v1::auth::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::IstioCertificateService,
};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::{
    Authority, CaError, Csr,
    token::{Reviewed, TokenReviewer},
};
use crate::server::{Server, secure::Peer};

/// Requests of one caller from one address: so many at once, …
const BURST: u32 = 30;
/// … and then one in this time.
const REFILL: Duration = Duration::from_secs(1);
/// Callers that are remembered; beyond it those that have rested are forgotten.
const MAX_CALLERS: usize = 10_000;

/// Who a caller is: by its certificate, else by its token.
#[derive(Clone)]
pub struct Authenticator {
    /// Reviews tokens; without one only certificates prove anything.
    pub tokens: Option<Arc<dyn TokenReviewer>>,
    /// Whose identities the mesh's service accounts are.
    pub trust_domain: String,
    /// Knows the pods that tokens are bound to.
    pub server: Arc<Server>,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator")
            .field("trust_domain", &self.trust_domain)
            .finish_non_exhaustive()
    }
}

/// What a request brings along to prove who sends it.
pub struct Credentials {
    peer: Peer,
    token: Option<String>,
}

/// Without the token.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Those of a request.
    pub fn of<T>(request: &Request<T>) -> Self {
        let value = request.metadata().get("authorization");
        let token = value.and_then(|v| v.to_str().ok()).and_then(|v| {
            v.strip_prefix("Bearer ")
                .or_else(|| v.strip_prefix("bearer "))
        });
        Self {
            peer: Peer::of(request),
            token: token.map(str::to_owned),
        }
    }

    /// The other end of the connection.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl Authenticator {
    /// Who the credentials are of.
    ///
    /// # Errors
    /// `UNAUTHENTICATED`: the caller learns nothing more; the log does.
    pub async fn caller(&self, credentials: &Credentials) -> Result<Identity, Status> {
        // A certificate of another trust domain is one of its authority, and says nothing about ours.
        if let Some(identity) = &credentials.peer.identity
            && identity.trust_domain() == self.trust_domain
        {
            return Ok(identity.clone());
        }
        let refused = |why: String| {
            warn!("a caller at {} is refused: {why}", credentials.peer.name());
            Status::unauthenticated("authentication failure")
        };
        let token = credentials
            .token
            .as_ref()
            .ok_or_else(|| refused("neither a client certificate nor a bearer token".to_owned()))?;
        let reviewer = self.tokens.as_ref().ok_or_else(|| {
            refused("a token, and nothing to prove it with: give --tokenKeys".to_owned())
        })?;
        let reviewed = reviewer
            .review(token)
            .await
            .map_err(|e| refused(e.to_string()))?;
        if !reviewer.knows_pods() {
            self.bound(&reviewed, &credentials.peer).map_err(refused)?;
        }
        reviewed
            .identity(&self.trust_domain)
            .map_err(|e| refused(e.to_string()))
    }

    /// A token that is bound to a pod is worth something in that pod alone: the pod is there, is of that service
    /// account, and is where the caller is. (In a cluster the API server says so, and node addresses may stand for
    /// pods'.)
    fn bound(&self, reviewed: &Reviewed, peer: &Peer) -> Result<(), String> {
        let Some(name) = &reviewed.pod else {
            return Ok(());
        };
        let namespace = &reviewed.namespace;
        let current = self.server.current();
        let pod = current
            .as_ref()
            .and_then(|push| push.mesh.workloads().pod(namespace, name));
        let pod = pod.ok_or_else(|| {
            format!("the token is bound to pod {namespace}/{name}, which does not exist")
        })?;
        let own = format!("/sa/{}", reviewed.service_account);
        if !pod.identity.is_empty() && !pod.identity.ends_with(&own) {
            return Err(format!(
                "the token is bound to pod {namespace}/{name}, which has another service account"
            ));
        }
        let Some(from) = peer.address.map(|a| a.ip().to_canonical().to_string()) else {
            return Ok(());
        };
        match pod.addresses.is_empty() || pod.addresses.contains(&from) {
            true => Ok(()),
            false => Err(format!(
                "the token is bound to pod {namespace}/{name} at {}",
                pod.addresses.join(", ")
            )),
        }
    }
}

/// The service.
#[derive(Debug)]
pub struct Certificates {
    authority: Arc<Authority>,
    authenticator: Authenticator,
    server: Arc<Server>,
    limits: Limits,
}

impl Certificates {
    /// Signs with `authority` for whom `authenticator` knows.
    pub fn new(
        authority: Arc<Authority>,
        authenticator: Authenticator,
        server: Arc<Server>,
        clock: Clock,
    ) -> Self {
        Self {
            authority,
            authenticator,
            server,
            limits: Limits {
                clock,
                callers: Mutex::default(),
            },
        }
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.server.metrics.count("citadel_server_csr_count", &[]);
        let credentials = Credentials::of(&request);
        let caller = match self.authenticator.caller(&credentials).await {
            Ok(caller) => caller,
            Err(status) => {
                self.server
                    .metrics
                    .count("citadel_server_authentication_failure_count", &[]);
                return Err(status);
            }
        };
        let from = credentials.peer().address.map(|a| a.ip());
        self.limits.pass(&caller, from)?;
        let request = request.into_inner();
        let lifetime = u64::try_from(request.validity_duration).unwrap_or(0);
        let signed = Csr::read(&request.csr, &caller).and_then(|csr| {
            self.authority
                .sign(&caller, from, &csr, Duration::from_secs(lifetime))
        });
        match signed {
            Ok(cert_chain) => {
                self.server
                    .metrics
                    .count("citadel_server_success_cert_issuance_count", &[]);
                info!("a certificate for {caller}");
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(error) => {
                warn!("no certificate for {caller}: {error}");
                let kind = match &error {
                    CaError::Csr(_) => "csr",
                    CaError::OtherIdentity { .. } => "identity",
                    CaError::Lifetime { .. } => "ttl",
                    _ => "sign",
                };
                self.server
                    .metrics
                    .count("citadel_server_csr_sign_error_count", &[("error", kind)]);
                Err(match error {
                    CaError::Csr(_) | CaError::Lifetime { .. } => {
                        Status::invalid_argument(error.to_string())
                    }
                    CaError::OtherIdentity { .. } => Status::permission_denied(error.to_string()),
                    // What is wrong with the authority is the operator's to know.
                    _ => Status::internal("the authority cannot sign now"),
                })
            }
        }
    }
}

/// How often callers may ask.
#[derive(Debug)]
struct Limits {
    clock: Clock,
    callers: Mutex<HashMap<(Identity, Option<IpAddr>), Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    left: u32,
    since: SystemTime,
}

impl Limits {
    fn pass(&self, caller: &Identity, from: Option<IpAddr>) -> Result<(), Status> {
        let now = self.clock.now();
        let mut callers = self.callers.lock();
        if callers.len() >= MAX_CALLERS {
            callers.retain(|_, b| b.left < BURST && b.refill(now) < BURST);
        }
        let bucket = callers.entry((caller.clone(), from)).or_insert(Bucket {
            left: BURST,
            since: now,
        });
        // A clock that was set back must keep nobody waiting for it to come here again.
        bucket.since = bucket.since.min(now);
        let left = bucket.refill(now);
        if left > bucket.left {
            *bucket = Bucket { left, since: now };
        }
        if bucket.left == 0 {
            return Err(Status::resource_exhausted(
                "too many certificate requests; wait a second",
            ));
        }
        bucket.left -= 1;
        Ok(())
    }
}

impl Bucket {
    fn refill(&self, now: SystemTime) -> u32 {
        let passed = now.duration_since(self.since).unwrap_or_default();
        let more = passed.as_millis() / REFILL.as_millis();
        self.left
            .saturating_add(u32::try_from(more).unwrap_or(u32::MAX))
            .min(BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_too_often_waits_whatever_the_clock_does() {
        let hour = Duration::from_secs(3600);
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Clock::manual(start);
        let limits = Limits {
            clock: clock.clone(),
            callers: Mutex::default(),
        };
        let web: Identity = "spiffe://td/ns/shop/sa/web".parse().expect("an identity");
        let at = |last: u8| Some(IpAddr::from([10, 0, 0, last]));
        let passed = |from| {
            let passes = (0..2 * BURST).take_while(|_| limits.pass(&web, from).is_ok());
            passes.count()
        };
        assert_eq!(passed(at(1)), BURST as usize);
        let refused = limits.pass(&web, at(1)).expect_err("too many");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert_eq!(
            passed(at(2)),
            BURST as usize,
            "another pod is another caller"
        );
        clock.set(start + 2 * REFILL);
        assert_eq!(passed(at(1)), 2);
        // An hour back, and a second on; an hour ahead.
        clock.set(start - hour);
        assert_eq!(passed(at(1)), 0);
        clock.set(start - hour + REFILL);
        assert_eq!(passed(at(1)), 1);
        clock.set(start + hour);
        assert_eq!(passed(at(1)), BURST as usize);
    }
}
