//! A TCP connection through an HTTP proxy: CONNECT over HTTP/1.1, then bytes.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    access_log::format::header_value, http::Exchange, io::Stream, plan::network::Tunneling,
};

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(super) enum TunnelError {
    /// What the configuration's format gives is no authority.
    #[error("tunneling_config.hostname: {0:?} is no host with a port")]
    Hostname(String),
    #[error("tunneling_config.headers_to_add: the value of {0} has bytes that no header may have")]
    Header(String),
    #[error("the proxy answered CONNECT with status {0}")]
    Refused(u16),
    #[error("the proxy's answer to CONNECT is no HTTP")]
    Malformed,
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Asks for the tunnel; bytes that follow the answer come with the next read.
pub(super) async fn establish(
    plan: &Tunneling,
    stream: &mut Stream,
    exchange: &Exchange<'_>,
) -> Result<(), TunnelError> {
    stream.write_all(&request(plan, exchange)?).await?;
    let mut answer = BytesMut::new();
    loop {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response
            .parse(&answer)
            .map_err(|_| TunnelError::Malformed)?;
        let (status, httparse::Status::Complete(length)) = (response.code, parsed) else {
            if answer.len() >= MAX_ANSWER {
                return Err(TunnelError::Malformed);
            }
            answer.reserve(1024);
            if stream.read_buf(&mut answer).await? == 0 {
                return Err(TunnelError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            continue;
        };
        match status {
            // An interim answer; the final one follows.
            Some(100..=199) => drop(answer.split_to(length)),
            Some(200..=299) => {
                if answer.len() > length {
                    stream.put_back(Bytes::copy_from_slice(&answer[length..]));
                }
                return Ok(());
            }
            status => return Err(TunnelError::Refused(status.unwrap_or(0))),
        }
    }
}

fn request(plan: &Tunneling, exchange: &Exchange<'_>) -> Result<BytesMut, TunnelError> {
    let mut hostname = Vec::new();
    header_value(&plan.hostname, exchange, None, &mut hostname);
    if hostname.is_empty() || !hostname.iter().all(u8::is_ascii_graphic) {
        let text = String::from_utf8_lossy(&hostname).into_owned();
        return Err(TunnelError::Hostname(text));
    }
    let mut out = BytesMut::new();
    for part in [
        b"CONNECT ",
        &hostname[..],
        b" HTTP/1.1\r\nhost: ",
        &hostname,
        b"\r\n",
    ] {
        out.put_slice(part);
    }
    for add in &plan.headers {
        let mut value = Vec::new();
        header_value(&add.value, exchange, None, &mut value);
        if value.is_empty() && !add.keep_empty_value {
            continue;
        }
        if value
            .iter()
            .any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f)
        {
            return Err(TunnelError::Header(add.name.to_string()));
        }
        for part in [add.name.as_bytes(), b": ", &value, b"\r\n"] {
            out.put_slice(part);
        }
    }
    out.put_slice(b"\r\n");
    Ok(out)
}

/// Envoy's limits of a response's head.
const MAX_ANSWER: usize = 60 * 1024;
const MAX_HEADERS: usize = 100;
