//! `envoy.service.auth.v3.Authorization/Check`.

use std::{collections::BTreeMap, time::SystemTime};

use bytes::Bytes;
use proto::envoy::{
    config::core::v3::{self as core, HeaderMap, HeaderValue, HeaderValueOption},
    service::auth::v3::{
        AttributeContext, CheckRequest, CheckResponse, attribute_context as context,
        check_response::HttpResponse,
    },
};
use serde_json::Value;

use super::{
    GrpcError, unary,
    values::{address, metadata, text, timestamp},
};
use crate::{
    filter::ext_authz::{Decision, Mutation, Verdict},
    listener::ConnectionInfo,
    plan::{ext_authz::GrpcCall, header::AppendAction, read::json},
    worker::Worker,
};

/// What the service is told of a connection.
#[derive(Debug, Default)]
pub(crate) struct About {
    /// The client's certificate, too.
    pub(crate) certificate: bool,
    /// The server name, too.
    pub(crate) tls_session: bool,
    /// What the client calls itself (`x-envoy-downstream-service-cluster`).
    pub(crate) service: String,
    /// Labels of the destination.
    pub(crate) labels: BTreeMap<String, String>,
    /// Of the route.
    pub(crate) extensions: BTreeMap<String, String>,
    /// Metadata by namespace.
    pub(crate) metadata: Vec<(String, Value)>,
    /// The route's.
    pub(crate) route_metadata: Vec<(String, Value)>,
}

/// What it is told of a request.
#[derive(Debug)]
pub(crate) struct AboutRequest {
    pub(crate) id: String,
    pub(crate) time: SystemTime,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) host: String,
    pub(crate) scheme: String,
    pub(crate) protocol: &'static str,
    /// Bytes of the body; -1 where it is not known.
    pub(crate) size: i64,
    /// Lower-case names, in order.
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    /// They go as bytes.
    pub(crate) raw_headers: bool,
    pub(crate) body: Bytes,
    pub(crate) raw_body: bool,
}

/// The question. Made before anything waits: it outlives what it is about.
#[derive(Debug)]
pub(crate) struct Question(CheckRequest);

impl Question {
    /// About a connection, or a request on it.
    pub(crate) fn new(
        connection: &ConnectionInfo,
        about: About,
        request: Option<AboutRequest>,
    ) -> Self {
        let session = connection.tls.as_deref();
        let trusted = session.and_then(|s| s.peer.as_deref().filter(|_| s.peer_trusted));
        let local = session.and_then(|s| s.local.as_deref());
        let principal = |certificate: Option<&tls::certificate::Certificate>| {
            let names = |c: &tls::certificate::Certificate| {
                let mut names = c.uris.iter().chain(&*c.dns);
                names.next().unwrap_or(&c.subject).to_string()
            };
            certificate.map(names).unwrap_or_default()
        };
        let shown = session.and_then(|s| s.peer.as_ref().filter(|_| about.certificate));
        let source = context::Peer {
            address: connection.remote.map(address),
            service: text(about.service.into_bytes()),
            principal: principal(trusted),
            certificate: shown.map(|c| c.url_encoded_pem()).unwrap_or_default(),
            ..Default::default()
        };
        let destination = context::Peer {
            address: connection.local.map(address),
            principal: principal(local),
            labels: about.labels,
            ..Default::default()
        };
        let tls_session = (about.tls_session && session.is_some()).then(|| context::TlsSession {
            sni: connection
                .requested_server_name
                .as_deref()
                .unwrap_or_default()
                .to_owned(),
        });
        Self(CheckRequest {
            attributes: Some(AttributeContext {
                source: Some(source),
                destination: Some(destination),
                request: request.map(attributes),
                context_extensions: about.extensions,
                metadata_context: Some(metadata(about.metadata)),
                route_metadata_context: (!about.route_metadata.is_empty())
                    .then(|| metadata(about.route_metadata)),
                tls_session,
            }),
        })
    }

    /// Asks.
    pub(crate) async fn ask(
        self,
        worker: &Worker,
        service: &GrpcCall,
    ) -> Result<Verdict, GrpcError> {
        let path = "/envoy.service.auth.v3.Authorization/Check";
        unary(worker, service, path, &self.0).await.map(verdict)
    }
}

fn attributes(about: AboutRequest) -> context::Request {
    let mut http = context::HttpRequest {
        id: about.id,
        method: about.method,
        path: about.path,
        host: about.host,
        scheme: about.scheme,
        size: about.size,
        protocol: about.protocol.to_owned(),
        ..Default::default()
    };
    if about.raw_headers {
        let each = about.headers.into_iter();
        let headers = each.map(|(key, raw_value)| HeaderValue {
            key,
            raw_value,
            ..Default::default()
        });
        http.header_map = Some(HeaderMap {
            headers: headers.collect(),
        });
    } else {
        for (name, value) in about.headers {
            let value = text(value);
            match http.headers.get_mut(&name) {
                Some(known) => {
                    known.push(',');
                    known.push_str(&value);
                }
                None => drop(http.headers.insert(name, value)),
            }
        }
    }
    match about.raw_body {
        true => http.raw_body = about.body.into(),
        false => http.body = text(about.body.into()),
    }
    context::Request {
        time: Some(timestamp(about.time)),
        http: Some(http),
    }
}

#[allow(deprecated)] // The inner `dynamic_metadata` is what older services send.
fn verdict(answer: CheckResponse) -> Verdict {
    let mut verdict = Verdict::default();
    let mut noted = answer.dynamic_metadata;
    let passes = answer.status.as_ref().map_or(0, |status| status.code) == 0;
    let status = |m: &Option<proto::envoy::r#type::v3::HttpStatus>| {
        let code = m.as_ref().map_or(0, |m| m.code);
        u16::try_from(code)
            .ok()
            .filter(|code| (200..600).contains(code))
    };
    verdict.decision = match (passes, answer.http_response) {
        (true, Some(HttpResponse::OkResponse(ok))) => {
            verdict.request = mutations(ok.headers);
            verdict.response = mutations(ok.response_headers_to_add);
            verdict.remove = ok.headers_to_remove;
            let set = ok.query_parameters_to_set.into_iter();
            verdict.query_set = set.map(|p| (p.key, p.value)).collect();
            verdict.query_remove = ok.query_parameters_to_remove;
            noted = ok.dynamic_metadata.or(noted);
            Decision::Pass
        }
        (true, _) => Decision::Pass,
        (false, Some(HttpResponse::ErrorResponse(error))) => Decision::Error {
            status: status(&error.status),
            headers: mutations(error.headers),
            body: error.body.into(),
        },
        (false, Some(HttpResponse::DeniedResponse(denied))) => Decision::Deny {
            status: status(&denied.status).unwrap_or(403),
            headers: mutations(denied.headers),
            body: denied.body.into(),
        },
        (false, _) => Decision::Deny {
            status: 403,
            headers: Vec::new(),
            body: Bytes::new(),
        },
    };
    verdict.metadata = noted.map(|noted| json(&noted));
    verdict
}

#[allow(deprecated)] // `append` is what services send.
fn mutations(list: Vec<HeaderValueOption>) -> Vec<Mutation> {
    use core::header_value_option::HeaderAppendAction as A;
    let one = |m: HeaderValueOption| {
        let header = m.header?;
        let action = match A::try_from(m.append_action) {
            Ok(A::AddIfAbsent) => AppendAction::AddIfAbsent,
            Ok(A::OverwriteIfExists) => AppendAction::OverwriteIfExists,
            // Unless it says otherwise, what the service says stands in place of what the client says.
            Ok(A::AppendIfExistsOrAdd) if m.append == Some(true) => {
                AppendAction::AppendIfExistsOrAdd
            }
            _ => AppendAction::OverwriteIfExistsOrAdd,
        };
        let value = match header.raw_value.is_empty() {
            true => header.value.into_bytes(),
            false => header.raw_value,
        };
        Some(Mutation {
            name: header.key.to_ascii_lowercase(),
            value,
            action,
        })
    };
    list.into_iter().filter_map(one).collect()
}
