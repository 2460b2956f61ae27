//! What happens to x-forwarded-client-cert.

use proto::{
    envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager as pb,
    xds::r#type::matcher::v3 as xds,
};

use super::{common::enumeration, matcher_tree::matcher};
use crate::plan::{
    error::{At, Step},
    http::{ClientCertDetails, ForwardClientCert},
    matcher_tree::Matcher,
};

/// `forward_client_cert_details`.
pub(super) fn forward(at: &At<'_>, number: i32) -> Step<ForwardClientCert> {
    use pb::ForwardClientCertDetails as F;
    Ok(
        match enumeration(at, "forward_client_cert_details", number)? {
            F::Sanitize => ForwardClientCert::Sanitize,
            F::ForwardOnly => ForwardClientCert::ForwardOnly,
            F::AppendForward => ForwardClientCert::AppendForward,
            F::SanitizeSet => ForwardClientCert::SanitizeSet,
            F::AlwaysForwardOnly => ForwardClientCert::AlwaysForwardOnly,
        },
    )
}

/// `SetCurrentClientCertDetails`.
pub(super) fn details(at: At<'_>, m: &pb::SetCurrentClientCertDetails) -> Step<ClientCertDetails> {
    let pb::SetCurrentClientCertDetails {
        subject,
        cert,
        chain,
        dns,
        uri,
        issuer,
        format,
    } = m;
    match enumeration(&at, "format", *format)? {
        pb::ForwardClientCertFormat::Text => {}
        pb::ForwardClientCertFormat::Json => {
            return Err(at
                .field("format")
                .not_implemented("is not implemented; write TEXT"));
        }
    }
    Ok(ClientCertDetails {
        subject: subject.unwrap_or(false),
        cert: *cert,
        chain: *chain,
        dns: *dns,
        uri: *uri,
        issuer: *issuer,
    })
}

/// `forward_client_cert_matcher`, whose actions are `ForwardClientCertConfig`.
pub(super) fn by_request(
    at: At<'_>,
    m: &xds::Matcher,
) -> Step<Box<Matcher<(ForwardClientCert, ClientCertDetails)>>> {
    let found = matcher(at, m, &mut |at, found| {
        if found.name
            != "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.ForwardClientCertConfig"
        {
            return Err(found.unknown(&at, "action"));
        }
        let m: pb::ForwardClientCertConfig = found.decode(&at)?;
        let set = &m.set_current_client_cert_details;
        let set = at.optional("set_current_client_cert_details", set, details)?;
        let forward = forward(&at, m.forward_client_cert_details)?;
        Ok((forward, set.unwrap_or_default()))
    })?;
    Ok(Box::new(found))
}
