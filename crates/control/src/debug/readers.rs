//! Who may read the pages below `/debug`: they tell of every workload what it may do and where it is.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tracing::info;

use crate::ca::token::TokenReviewer;

/// Who asks from the control plane's own pod (as `kubectl port-forward` does), or with a token of its namespace.
pub struct Readers {
    namespace: String,
    tokens: OnceLock<Arc<dyn TokenReviewer>>,
}

impl std::fmt::Debug for Readers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Readers")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Readers {
    /// Of the control plane's namespace.
    pub fn new(namespace: &str) -> Self {
        Readers {
            namespace: namespace.to_owned(),
            tokens: OnceLock::new(),
        }
    }

    /// Believes tokens that this one proves; before, and without, none is believed.
    pub fn trust(&self, tokens: Arc<dyn TokenReviewer>) {
        let _ = self.tokens.set(tokens);
    }

    async fn admit(&self, headers: &HeaderMap) -> Result<(), (StatusCode, String)> {
        let refuse = |why: &str| {
            let text = format!(
                "{why}: ask from within the pod (kubectl port-forward), or with `Authorization: Bearer` and a token of \
                 namespace {} for istio-ca\n",
                self.namespace
            );
            (StatusCode::UNAUTHORIZED, text)
        };
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| refuse("no token"))?;
        let tokens = self.tokens.get();
        let tokens = tokens.ok_or_else(|| refuse("no token is believed here"))?;
        // Why a token is not good is for the log: its bearer is unknown.
        let reviewed = tokens.review(token).await.map_err(|e| {
            info!("debug pages: a token was refused: {e}");
            refuse("the token is not good")
        })?;
        if reviewed.namespace == self.namespace {
            return Ok(());
        }
        let text = format!("these pages are for namespace {} alone\n", self.namespace);
        Err((StatusCode::FORBIDDEN, text))
    }
}

/// Lets the readers through.
pub(super) async fn only(
    State(readers): State<Arc<Readers>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    if !peer.ip().to_canonical().is_loopback()
        && let Err(refused) = readers.admit(request.headers()).await
    {
        return refused.into_response();
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use axum::{Router, body::Body, routing::get};
    use tower::ServiceExt;

    use super::*;
    use crate::ca::token::{Review, Reviewed, TokenError};

    struct Tokens;

    impl TokenReviewer for Tokens {
        /// A token is the name of its namespace here.
        fn review<'a>(&'a self, token: &'a str) -> Review<'a> {
            Box::pin(async move {
                match token {
                    "forged" => Err(TokenError::Signature),
                    namespace => Ok(Reviewed {
                        namespace: namespace.to_owned(),
                        service_account: "reader".to_owned(),
                        pod: None,
                    }),
                }
            })
        }
    }

    async fn ask(readers: &Arc<Readers>, peer: &str, token: Option<&str>) -> u16 {
        let layer = axum::middleware::from_fn_with_state(readers.clone(), only);
        let pages = Router::new()
            .route("/debug", get(|| async {}))
            .route_layer(layer);
        let peer: SocketAddr = peer.parse().unwrap();
        let mut request = Request::get("/debug").extension(ConnectInfo(peer));
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Body::empty()).unwrap();
        pages.oneshot(request).await.unwrap().status().as_u16()
    }

    #[tokio::test]
    async fn pages_are_for_the_pod_itself_and_for_tokens_of_its_namespace() {
        let readers = Arc::new(Readers::new("istio-system"));
        let far = "[::ffff:10.1.2.3]:4711";
        assert_eq!(ask(&readers, far, Some("istio-system")).await, 401);
        readers.trust(Arc::new(Tokens));
        assert_eq!(ask(&readers, far, None).await, 401);
        assert_eq!(ask(&readers, far, Some("forged")).await, 401);
        assert_eq!(ask(&readers, far, Some("shop")).await, 403);
        assert_eq!(ask(&readers, far, Some("istio-system")).await, 200);
        for near in ["127.0.0.1:4711", "[::1]:4711", "[::ffff:127.0.0.1]:4711"] {
            assert_eq!(ask(&readers, near, None).await, 200, "{near}");
        }
    }
}
