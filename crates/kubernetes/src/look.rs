//! What a command asks of a cluster before it changes anything: lists, versions, clocks, rights.

use http::Request;
use jiff::Timestamp;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
    client::Body,
};
use serde_json::Value;

use crate::{ClusterError, code, resource};

/// Objects of one kind, wherever they are, as the API server writes them. None where the kind is not installed.
///
/// # Errors
/// Where the API server does not answer, or refuses.
pub async fn list(
    client: &Client,
    api_version: &str,
    kind: &str,
    plural: &str,
) -> Result<Vec<Value>, ClusterError> {
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    let api = resource::all(client, &resource::resource(group, version, kind, plural));
    let mut params = ListParams::default().limit(PAGE);
    let mut out = Vec::new();
    loop {
        let page = match api.list(&params).await {
            Ok(page) => page,
            Err(e) if code(&e) == Some(404) => return Ok(Vec::new()),
            Err(e) => return Err(ClusterError::request(plural)(e)),
        };
        for object in page.items {
            out.push(
                serde_json::to_value(object).map_err(|e| ClusterError::Object {
                    what: plural.to_owned(),
                    why: e.to_string(),
                })?,
            );
        }
        match page.metadata.continue_ {
            Some(next) if !next.is_empty() => params = params.continue_token(&next),
            _ => return Ok(out),
        }
    }
}

/// The API server's version and by how many seconds its clock is ahead of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// As in `v1.36.3`.
    pub version: String,
    /// Its major and minor number.
    pub minor: (u32, u32),
    /// None where it says no time.
    pub ahead: Option<i64>,
}

/// Asks the API server who it is.
///
/// # Errors
/// Where it does not answer.
pub async fn server(client: &Client) -> Result<Server, ClusterError> {
    let wrong = |why: String| ClusterError::Object {
        what: "GET /version".to_owned(),
        why,
    };
    let request = Request::get("/version")
        .body(Body::empty())
        .map_err(|e| wrong(e.to_string()))?;
    let answer = client
        .send(request)
        .await
        .map_err(ClusterError::request("GET /version"))?;
    let ahead = answer
        .headers()
        .get("date")
        .and_then(|d| d.to_str().ok())
        .and_then(|d| jiff::fmt::rfc2822::parse(d).ok())
        .map(|d| d.timestamp().as_second() - Timestamp::now().as_second());
    let body = answer.into_body().collect_bytes().await;
    let body = body.map_err(ClusterError::request("GET /version"))?;
    let info: Value = serde_json::from_slice(&body).map_err(|e| wrong(e.to_string()))?;
    let number = |key: &str| {
        let text = info[key].as_str().unwrap_or_default();
        // Providers append a sign, as in `29+`.
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    };
    Ok(Server {
        version: info["gitVersion"].as_str().unwrap_or_default().to_owned(),
        minor: (number("major"), number("minor")),
        ahead,
    })
}

/// Whether we may do that in the whole cluster.
///
/// # Errors
/// Where the API server does not answer.
pub async fn may(
    client: &Client,
    verb: &str,
    group: &str,
    plural: &str,
) -> Result<bool, ClusterError> {
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: Some(group.to_owned()),
                resource: Some(plural.to_owned()),
                verb: Some(verb.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let answer = api
        .create(&PostParams::default(), &review)
        .await
        .map_err(ClusterError::request("SelfSubjectAccessReview"))?;
    Ok(answer.status.is_some_and(|s| s.allowed))
}

const PAGE: u32 = 500;
