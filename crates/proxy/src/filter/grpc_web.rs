//! `envoy.filters.http.grpc_web`: browsers, which can read no trailers, talk to gRPC servers.
//!
//! The request becomes gRPC; of the response the trailers become a last message of its body. The text form is base64 both
//! ways, in pieces that may each have their own padding.

use std::mem;

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use outrigger_http::{Framing, Headers, Refusal, RequestHead, ResponseHead};

use super::{Filter, Interests, Step};
use crate::{http::Exchange, plan::http_filter::RouteFilterConfig, worker::Worker};

/// The filter; it has no configuration.
#[derive(Debug)]
pub(crate) struct GrpcWebFilter;

/// What it remembers about a request.
#[derive(Debug)]
pub(crate) enum GrpcWeb {
    /// The request is another one.
    Other,
    /// It is one of gRPC-Web.
    Call {
        /// What of the request's base64 does not make a byte yet; `None` for the binary form.
        decode: Option<Vec<u8>>,
        /// The client wants base64.
        encode: bool,
        /// The response is gRPC, so that its end is told in its body.
        answered: bool,
    },
}

impl GrpcWebFilter {
    /// Looks at the head once. A filter before this one may have waited for the body, so that data comes first.
    fn begin<'e>(&self, exchange: &'e mut Exchange<'_>) -> &'e mut GrpcWeb {
        let (state, request) = (&mut exchange.filters.grpc_web, &mut exchange.request);
        state.get_or_insert_with(|| Self::translate(request))
    }

    fn translate(request: &mut RequestHead) -> GrpcWeb {
        let headers = &mut request.headers;
        let form = |name: &str, headers: &Headers| Form::of(headers.get(name)?);
        let Some(form_in) = form("content-type", headers) else {
            return GrpcWeb::Other;
        };
        let encode = form("accept", headers) == Some(Form::Text);
        headers.set("content-type", "application/grpc");
        headers.set("te", "trailers");
        headers.set("grpc-accept-encoding", "identity");
        // The length of what goes up differs, or is not said in gRPC.
        headers.remove("content-length");
        if matches!(request.framing, Framing::Length(_)) {
            request.framing = Framing::Chunked;
        }
        GrpcWeb::Call {
            decode: (form_in == Form::Text).then(Vec::new),
            encode,
            answered: false,
        }
    }
}

impl Filter for GrpcWebFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
            .and(Interests::REQUEST_DATA)
            .and(Interests::RESPONSE)
            .and(Interests::RESPONSE_DATA)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        self.begin(exchange);
        Step::Continue
    }

    fn request_data(&self, exchange: &mut Exchange<'_>, data: &mut Bytes) -> Result<(), Refusal> {
        if let GrpcWeb::Call {
            decode: Some(rest), ..
        } = self.begin(exchange)
        {
            *data = decode(rest, data).ok_or(NO_BASE64)?;
        }
        Ok(())
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        let Some(GrpcWeb::Call {
            encode, answered, ..
        }) = &mut exchange.filters.grpc_web
        else {
            return;
        };
        // What is no gRPC is passed on as it is: a redirect, the page of some other server.
        if !response.is_grpc() {
            return;
        }
        *answered = true;
        let kind = match encode {
            true => "application/grpc-web-text+proto",
            false => "application/grpc-web+proto",
        };
        response.headers.set("content-type", kind);
        response.headers.remove("content-length");
        if matches!(response.framing, Framing::Length(_)) {
            response.framing = Framing::Chunked;
        }
    }

    fn response_data(&self, exchange: &mut Exchange<'_>, data: &mut Bytes) {
        if let Some(GrpcWeb::Call {
            encode: true,
            answered: true,
            ..
        }) = exchange.filters.grpc_web
        {
            *data = STANDARD.encode(&*data).into();
        }
    }

    fn end(&self, exchange: &mut Exchange<'_>, trailers: &Headers) -> Option<Bytes> {
        let Some(GrpcWeb::Call {
            encode,
            answered: true,
            ..
        }) = exchange.filters.grpc_web
        else {
            return None;
        };
        let message = message(trailers);
        Some(match encode {
            true => STANDARD.encode(&message).into(),
            false => message,
        })
    }
}

/// The forms of gRPC-Web.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Binary,
    Text,
}

impl Form {
    fn of(value: &[u8]) -> Option<Form> {
        match value {
            b"application/grpc-web" | b"application/grpc-web+proto" => Some(Form::Binary),
            b"application/grpc-web-text" | b"application/grpc-web-text+proto" => Some(Form::Text),
            _ => None,
        }
    }
}

/// Trailers as the last message of a body: marked by the highest bit, lines of HTTP/1.
fn message(trailers: &Headers) -> Bytes {
    let mut lines = BytesMut::new();
    for (name, value) in trailers.iter() {
        lines.put_slice(name.to_ascii_lowercase().as_bytes());
        lines.put_u8(b':');
        lines.put_slice(value);
        lines.put_slice(b"\r\n");
    }
    let mut message = BytesMut::with_capacity(5 + lines.len());
    message.put_u8(0x80);
    message.put_u32(lines.len() as u32);
    message.put_slice(&lines);
    message.freeze()
}

/// Base64 in pieces; `rest` holds up to three letters between them. `None` where it is none.
fn decode(rest: &mut Vec<u8>, data: &[u8]) -> Option<Bytes> {
    let mut letters = mem::take(rest);
    letters.extend_from_slice(data);
    let whole = letters.len() / 4 * 4;
    *rest = letters.split_off(whole);
    let mut out = Vec::with_capacity(whole / 4 * 3);
    // Each piece that the client encoded by itself ends in its own padding.
    let mut from = 0;
    while from < whole {
        let padded = letters[from..].iter().position(|&letter| letter == b'=');
        let to = padded.map_or(whole, |at| (from + at) / 4 * 4 + 4);
        STANDARD.decode_vec(&letters[from..to], &mut out).ok()?;
        from = to;
    }
    Some(out.into())
}

const NO_BASE64: Refusal = Refusal {
    status: 400,
    detail: "grpc_base_64_decode_failed",
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_whatever_the_pieces() {
        let text = [
            STANDARD.encode("a"),
            STANDARD.encode("some"),
            STANDARD.encode("words!"),
        ]
        .concat();
        for size in 1..text.len() {
            let (mut rest, mut out) = (Vec::new(), Vec::new());
            for piece in text.as_bytes().chunks(size) {
                out.extend_from_slice(&decode(&mut rest, piece).unwrap());
            }
            assert_eq!(out, b"asomewords!", "pieces of {size}");
            assert!(rest.is_empty());
        }
        for wrong in ["a===", "====", "a b=", "YQ=a", "\u{7f}aaa"] {
            assert_eq!(decode(&mut Vec::new(), wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn trailers_are_a_message_with_the_highest_bit() {
        let trailers: Headers = [("Grpc-Status", "0"), ("x", "y")].into_iter().collect();
        assert_eq!(
            &message(&trailers)[..],
            b"\x80\x00\x00\x00\x14grpc-status:0\r\nx:y\r\n"
        );
    }
}
