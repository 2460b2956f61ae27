//! `x-forwarded-client-cert`: who the client is, told to whoever comes next.

use std::{borrow::Cow, fmt::Write as _};

use tls::{certificate::url_encoded_pem, session::Session};

use super::Exchange;
use crate::plan::{
    HttpConnectionManager,
    http::{ClientCertDetails, ForwardClientCert},
};

/// Brings the header in line with the connection: on one whose client showed no certificate nobody vouches for it.
pub(super) fn set(plan: &HttpConnectionManager, exchange: &mut Exchange<'_>) {
    const NAME: &str = "x-forwarded-client-cert";
    let connection = exchange.connection;
    let session = connection
        .tls
        .as_deref()
        .filter(|session| session.peer.is_some());
    let own = plan.forward_client_cert_matcher.as_deref();
    let own = own.and_then(|matcher| matcher.find(&*exchange)).copied();
    let (forward, _) = own.unwrap_or((plan.forward_client_cert, plan.client_cert_details));
    let headers = &mut exchange.request.headers;
    // What the connection keeps says what the connection manager wants of all requests.
    let element = |session: &Session| match &own {
        Some((_, details)) => Cow::Owned(element(session, details).into()),
        None => Cow::Borrowed(
            &**connection
                .xfcc
                .get_or_init(|| element(session, &plan.client_cert_details)),
        ),
    };
    match (forward, session) {
        (ForwardClientCert::AlwaysForwardOnly, _) | (ForwardClientCert::ForwardOnly, Some(_)) => {}
        (ForwardClientCert::AppendForward, Some(session)) => {
            super::append(headers, NAME, element(session).as_bytes(), ",");
        }
        (ForwardClientCert::SanitizeSet, Some(session)) => {
            headers.set(NAME, element(session).as_bytes());
        }
        _ => {
            headers.remove(NAME);
        }
    }
}

/// One element, in Envoy's order: By, Hash, Cert, Chain, Subject, URI, DNS, Issuer.
fn element(session: &Session, details: &ClientCertDetails) -> Box<str> {
    let mut out = String::new();
    let mut put = |key: &str, value: &str| {
        if !out.is_empty() {
            out.push(';');
        }
        out.push_str(key);
        out.push('=');
        out.push_str(value);
    };
    for uri in session.local.iter().flat_map(|local| &local.uris) {
        put("By", &quoted(uri));
    }
    let Some(peer) = &session.peer else {
        return out.into();
    };
    put("Hash", &peer.fingerprint());
    if details.cert {
        put("Cert", &format!("\"{}\"", peer.url_encoded_pem()));
    }
    if details.chain {
        let mut chain = String::new();
        for der in session.peer_chain.iter() {
            // Writing to a String cannot fail.
            let _ = write!(chain, "{}", url_encoded_pem(der));
        }
        put("Chain", &format!("\"{chain}\""));
    }
    if details.subject {
        // There even where it is empty.
        put("Subject", &format!("\"{}\"", escaped(&peer.subject)));
    }
    if details.uri {
        match &*peer.uris {
            [] => put("URI", ""),
            uris => uris.iter().for_each(|uri| put("URI", &quoted(uri))),
        }
    }
    if details.dns {
        peer.dns.iter().for_each(|name| put("DNS", &quoted(name)));
    }
    if details.issuer {
        put("Issuer", &format!("\"{}\"", escaped(&peer.issuer)));
    }
    out.into()
}

/// A value that would be read as more than one is quoted: nobody becomes somebody else by a name with a comma in it.
fn quoted(value: &str) -> String {
    match value.contains([',', ';', '"', '=']) {
        true => format!("\"{}\"", escaped(value)),
        false => value.to_owned(),
    }
}

/// Within quotes: a quote that RFC 2253 has escaped already stays as it is.
fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let mut escape = false;
    for c in value.chars() {
        if c == '"' && !escape {
            out.push('\\');
        }
        escape = c == '\\' && !escape;
        if c.is_control() {
            // A header has no place for it.
            continue;
        }
        out.push(c);
    }
    if escape {
        // A backslash at the end would take the closing quote with it.
        out.push('\\');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_out_of_the_quotes() {
        assert_eq!(quoted("spiffe://td/ns/a/sa/b"), "spiffe://td/ns/a/sa/b");
        assert_eq!(quoted("x,By=y"), "\"x,By=y\"");
        assert_eq!(quoted("x\";y"), "\"x\\\";y\"");
        assert_eq!(escaped("CN=a\\\"b"), "CN=a\\\"b");
        assert_eq!(escaped("CN=a\\"), "CN=a\\\\");
        assert_eq!(escaped("a\r\nb"), "ab");
    }
}
