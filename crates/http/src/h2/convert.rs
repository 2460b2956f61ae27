//! Heads ↔ the types of the `http` crate.

use ::h2::ext::Protocol;
use http::{HeaderMap, HeaderName, HeaderValue, Uri, header};

use crate::{Error, Framing, Headers, Method, Refusal, RequestHead, ResponseHead, Version};

/// A request as it came on a stream.
pub(super) fn request_in(request: &http::Request<::h2::RecvStream>) -> RequestHead {
    let uri = request.uri();
    let host = || {
        request
            .headers()
            .get(header::HOST)
            .and_then(|host| host.to_str().ok())
    };
    let authority = uri
        .authority()
        .map(|a| a.as_str())
        .or_else(host)
        .unwrap_or("");
    let path = uri.path_and_query().map_or("", |path| path.as_str());
    let protocol = request.extensions().get::<Protocol>();
    let method = match protocol {
        // As HTTP/1 says it (RFC 8441, 5): what follows need not know which of the two it was.
        Some(_) => Method::Get,
        None => Method::from_token(request.method().as_str()),
    };
    let path = if method == Method::Connect { "" } else { path };
    let mut head = RequestHead::new(Version::Http2, method, authority, path);
    if let Some(scheme) = uri.scheme_str() {
        head.set_scheme(scheme);
    }
    fields_in(request.headers(), &mut head.headers);
    if let Some(protocol) = protocol {
        head.headers.append("upgrade", protocol.as_str());
        head.upgrade = true;
    }
    head.upgrade |= head.method == Method::Connect;
    head.expects_continue = head
        .headers
        .get("expect")
        .is_some_and(|v| v.eq_ignore_ascii_case(b"100-continue"));
    head.framing = framing_in(request.body(), &head.headers);
    head
}

/// A response as it came on a stream.
pub(super) fn response_in<B>(
    response: &http::Response<B>,
    body: Option<&::h2::RecvStream>,
) -> ResponseHead {
    let mut head = ResponseHead::new(response.status().as_u16());
    head.version = Version::Http2;
    fields_in(response.headers(), &mut head.headers);
    if let Some(body) = body {
        head.framing = framing_in(body, &head.headers);
    }
    head
}

fn framing_in(body: &::h2::RecvStream, headers: &Headers) -> Framing {
    if body.is_end_stream() {
        return Framing::None;
    }
    match headers
        .get_str("content-length")
        .and_then(|length| length.parse().ok())
    {
        // `h2` itself holds the sender to this length.
        Some(length) if length > 0 => Framing::Length(length),
        _ => Framing::Chunked,
    }
}

/// Fields of a map into a block; cookie crumbs are put together (RFC 9113, 8.2.3).
pub(super) fn fields_in(map: &HeaderMap, headers: &mut Headers) {
    let mut cookies: Option<Vec<u8>> = None;
    for (name, value) in map {
        if name == header::HOST {
            continue;
        }
        if name == header::COOKIE {
            match &mut cookies {
                Some(cookies) => {
                    cookies.extend_from_slice(b"; ");
                    cookies.extend_from_slice(value.as_bytes());
                }
                None => cookies = Some(value.as_bytes().to_vec()),
            }
            continue;
        }
        headers.push_parsed(name.as_str().as_bytes(), value.as_bytes());
    }
    if let Some(cookies) = cookies {
        headers.push_parsed(b"cookie", &cookies);
    }
}

/// A block into a map; what HTTP/2 does not know is left out.
pub(super) fn fields_out(headers: &Headers) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers.iter() {
        if CONNECTION_FIELDS
            .iter()
            .any(|field| name.eq_ignore_ascii_case(field))
        {
            continue;
        }
        // Both are valid in HTTP/1 as we parse it; a filter's mistake is left out, not sent.
        if let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(name.as_bytes()),
            HeaderValue::from_bytes(value),
        ) {
            map.append(name, value);
        }
    }
    map
}

/// A request for a stream.
pub(super) fn request_out(
    head: &RequestHead,
    framing: Framing,
) -> Result<http::Request<()>, Error> {
    const INVALID: Refusal = Refusal {
        status: 400,
        detail: "http2.invalid_request",
    };
    let upgrade = head.headers.get_str("upgrade").filter(|_| head.upgrade);
    let mut request = http::Request::new(());
    *request.version_mut() = http::Version::HTTP_2;
    let mut uri = Uri::builder();
    if head.method == Method::Connect {
        uri = uri.authority(head.authority());
    } else {
        let scheme = if head.scheme() == "https" {
            "https"
        } else {
            "http"
        };
        uri = uri
            .scheme(scheme)
            .authority(head.authority())
            .path_and_query(head.path());
    }
    *request.uri_mut() = uri.build().map_err(|_| INVALID)?;
    *request.method_mut() = match upgrade {
        Some(protocol) => {
            request.extensions_mut().insert(Protocol::from(protocol));
            http::Method::CONNECT
        }
        None => http::Method::from_bytes(head.method.as_str().as_bytes()).map_err(|_| INVALID)?,
    };
    let mut map = fields_out(&head.headers);
    length_out(&mut map, framing);
    *request.headers_mut() = map;
    Ok(request)
}

/// A response for a stream.
pub(super) fn response_out(
    head: &ResponseHead,
    framing: Framing,
    is_head: bool,
) -> http::Response<()> {
    let mut response = http::Response::new(());
    *response.version_mut() = http::Version::HTTP_2;
    // The answer to an extended CONNECT (RFC 8441, 5.1).
    let status = if head.status == 101 { 200 } else { head.status };
    *response.status_mut() =
        http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::BAD_GATEWAY);
    let mut map = fields_out(&head.headers);
    if !is_head {
        length_out(&mut map, framing);
    }
    *response.headers_mut() = map;
    response
}

/// A declared length that is not the body's would make the message malformed.
fn length_out(map: &mut HeaderMap, framing: Framing) {
    match framing {
        Framing::Length(length) => {
            map.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        Framing::None => {}
        _ => {
            map.remove(header::CONTENT_LENGTH);
        }
    }
}

const CONNECTION_FIELDS: [&str; 7] = [
    "host",
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];
