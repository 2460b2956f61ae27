//! TokenReview: whose a service account token is, in the judgement of the API server that signed it.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};

/// Whom a token speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Namespace of the service account.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The pod that the token is bound to.
    pub pod: Option<String>,
}

/// Why a token was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// The API server does not know the token, or not for this audience.
    #[error("the API server does not accept it: {0}")]
    Refused(String),
    /// It is of a user, not of a service account.
    #[error("the user {0:?} is no service account")]
    Subject(String),
    /// The API server could not be asked.
    #[error("the API server cannot be asked: {0}")]
    Unavailable(String),
}

/// Asks the API server.
pub async fn review(client: &Client, token: &str, audience: &str) -> Result<Subject, ReviewError> {
    let api: Api<TokenReview> = Api::all(client.clone());
    let request = TokenReview {
        metadata: ObjectMeta::default(),
        spec: TokenReviewSpec {
            audiences: Some(vec![audience.to_owned()]),
            token: token.to_owned(),
        },
        status: None,
    };
    let params = PostParams::default();
    let asked = tokio::time::timeout(PATIENCE, api.create(&params, &request)).await;
    let answer = match asked {
        Ok(Ok(answer)) => answer,
        Ok(Err(e)) => return Err(ReviewError::Unavailable(e.to_string())),
        Err(_) => {
            return Err(ReviewError::Unavailable(format!(
                "no answer in {PATIENCE:?}"
            )));
        }
    };
    let status = answer.status.unwrap_or_default();
    if status.authenticated != Some(true) {
        return Err(ReviewError::Refused(
            status
                .error
                .unwrap_or_else(|| "it is not authentic".to_owned()),
        ));
    }
    // A server that knows nothing of audiences leaves them out, and would accept tokens that are meant for others.
    let audiences = status.audiences.unwrap_or_default();
    if !audiences.iter().any(|a| a == audience) {
        return Err(ReviewError::Refused(format!(
            "meant for {audiences:?}, not for {audience}"
        )));
    }
    let user = status.user.unwrap_or_default();
    let pod = user
        .extra
        .as_ref()
        .and_then(|extra| extra.get(POD)?.first().cloned());
    let name = user.username.unwrap_or_default();
    let parts = name
        .strip_prefix("system:serviceaccount:")
        .and_then(|rest| rest.split_once(':'));
    match parts {
        Some((namespace, account)) if !namespace.is_empty() && !account.is_empty() => Ok(Subject {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
            pod,
        }),
        _ => Err(ReviewError::Subject(name)),
    }
}

const POD: &str = "authentication.kubernetes.io/pod-name";
const PATIENCE: Duration = Duration::from_secs(10);
