//! gRPC without generated code: `outrigger.echo.v1.Echo` with a unary method `Say` and a streaming one, `Repeat`.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use prost::Message;
use tokio::net::{TcpListener, TcpStream};

/// What is asked.
#[derive(Clone, PartialEq, Message)]
pub(super) struct EchoRequest {
    #[prost(string, tag = "1")]
    pub(super) text: String,
    /// For `Repeat`: how many answers.
    #[prost(uint32, tag = "2")]
    pub(super) times: u32,
}

/// What is answered.
#[derive(Clone, PartialEq, Message)]
pub(super) struct EchoReply {
    #[prost(string, tag = "1")]
    pub(super) text: String,
    #[prost(string, tag = "2")]
    pub(super) pod: String,
    #[prost(string, tag = "3")]
    pub(super) peer: String,
    /// Of a stream, counted from 1.
    #[prost(uint32, tag = "4")]
    pub(super) number: u32,
}

pub(super) const SAY: &str = "/outrigger.echo.v1.Echo/Say";
pub(super) const REPEAT: &str = "/outrigger.echo.v1.Echo/Repeat";

/// Serves until the listener fails.
pub(super) async fn serve(listener: TcpListener, pod: String) -> io::Result<()> {
    loop {
        let (stream, peer) = listener.accept().await?;
        let pod = pod.clone();
        tokio::task::spawn_local(async move {
            let Ok(mut connection) = h2::server::handshake(stream).await else {
                return;
            };
            while let Some(Ok((request, respond))) = connection.accept().await {
                let (pod, peer) = (pod.clone(), peer.ip().to_canonical().to_string());
                tokio::task::spawn_local(async move {
                    // A client that breaks off is its own business.
                    let _ = answer(request, respond, pod, peer).await;
                });
            }
        });
    }
}

async fn answer(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    pod: String,
    peer: String,
) -> Result<(), h2::Error> {
    let path = request.uri().path().to_owned();
    let mut response = Response::new(());
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    let failed = |code: u32, text: &str| {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", HeaderValue::from(code));
        if let Ok(text) = HeaderValue::from_str(text) {
            headers.insert("grpc-message", text);
        }
        headers
    };
    let times = match path.as_str() {
        SAY => Some(false),
        REPEAT => Some(true),
        _ => None,
    };
    let (Some(many), message) = (times, read_message(request.into_body()).await?) else {
        response
            .headers_mut()
            .extend(failed(12, "there is no such method"));
        respond.send_response(response, true)?;
        return Ok(());
    };
    let Some(asked) = message.and_then(|m| EchoRequest::decode(m).ok()) else {
        response
            .headers_mut()
            .extend(failed(3, "the request is not an EchoRequest"));
        respond.send_response(response, true)?;
        return Ok(());
    };
    let mut stream = respond.send_response(response, false)?;
    for number in 1..=if many { asked.times } else { 1 } {
        let reply = EchoReply {
            text: asked.text.clone(),
            pod: pod.clone(),
            peer: peer.clone(),
            number,
        };
        send(&mut stream, frame(&reply)).await?;
    }
    stream.send_trailers(failed(0, ""))
}

/// A message with gRPC's five bytes before it.
pub(super) fn frame(message: &impl Message) -> Bytes {
    let mut out = BytesMut::with_capacity(5 + message.encoded_len());
    out.put_u8(0);
    out.put_u32(message.encoded_len() as u32);
    out.put_slice(&message.encode_to_vec());
    out.freeze()
}

/// Sends as much at a time as the peer's window takes.
pub(super) async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(Ok(n)) => stream.send_data(data.split_to(n.min(data.len())), false)?,
            Some(Err(e)) => return Err(e),
            None => return Err(h2::Reason::STREAM_CLOSED.into()),
        }
    }
    Ok(())
}

async fn read_message(mut body: RecvStream) -> Result<Option<Bytes>, h2::Error> {
    let mut frames = Frames::default();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        let _ = body.flow_control().release_capacity(chunk.len());
        frames.push(&chunk);
        if let Some(message) = frames.next() {
            return Ok(Some(message));
        }
    }
    Ok(None)
}

/// Cuts messages out of a body.
#[derive(Debug, Default)]
struct Frames(BytesMut);

impl Frames {
    fn push(&mut self, chunk: &[u8]) {
        self.0.extend_from_slice(chunk);
    }

    fn next(&mut self) -> Option<Bytes> {
        let length = u32::from_be_bytes(self.0.get(1..5)?.try_into().ok()?) as usize;
        if self.0.len() < 5 + length {
            return None;
        }
        let mut message = self.0.split_to(5 + length);
        Some(message.split_off(5).freeze())
    }
}

/// What came of a call.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) http_status: StatusCode,
    pub(super) grpc_status: String,
    pub(super) grpc_message: String,
    pub(super) replies: Vec<EchoReply>,
    pub(super) headers: HeaderMap,
}

/// Calls `Say` or `Repeat` on a connection of its own.
pub(super) async fn call(
    host: &str,
    port: u16,
    method: &str,
    request: &EchoRequest,
    headers: &HeaderMap,
) -> Result<Outcome, String> {
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|e| format!("connect to {host}:{port}: {e}"))?;
    // A stream of small messages is no attack here: h2 would give up after a hundred that arrive together.
    let (client, connection) = h2::client::Builder::new()
        .data_frame_budget(1 << 24)
        .handshake(stream)
        .await
        .map_err(|e| e.to_string())?;
    tokio::task::spawn_local(async move {
        // The call that it breaks reports the error.
        let _ = connection.await;
    });
    let mut client = client.ready().await.map_err(|e| e.to_string())?;
    let mut head = Request::post(format!("http://{host}:{port}{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(|e| e.to_string())?;
    head.headers_mut().extend(headers.clone());
    let (response, mut body) = client
        .send_request(head, false)
        .map_err(|e| e.to_string())?;
    send(&mut body, frame(request))
        .await
        .map_err(|e| e.to_string())?;
    body.send_data(Bytes::new(), true)
        .map_err(|e| e.to_string())?;
    let (parts, mut body) = response.await.map_err(|e| e.to_string())?.into_parts();
    let mut frames = Frames::default();
    let mut replies = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|e| e.to_string())?;
        let _ = body.flow_control().release_capacity(chunk.len());
        frames.push(&chunk);
        while let Some(message) = frames.next() {
            replies.push(EchoReply::decode(message).map_err(|e| e.to_string())?);
        }
    }
    let trailers = body
        .trailers()
        .await
        .map_err(|e| e.to_string())?
        .unwrap_or_default();
    let status = |name: &str| {
        let value = trailers.get(name).or_else(|| parts.headers.get(name));
        value
            .map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned())
            .unwrap_or_default()
    };
    Ok(Outcome {
        http_status: parts.status,
        grpc_status: status("grpc-status"),
        grpc_message: status("grpc-message"),
        replies,
        headers: parts.headers.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn unary_streaming_and_unknown_methods() {
        let work = async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            tokio::task::spawn_local(serve(listener, "server".to_owned()));
            let request = EchoRequest {
                text: "hi".into(),
                times: 300,
            };
            let one = call("127.0.0.1", port, SAY, &request, &HeaderMap::new())
                .await
                .unwrap();
            assert_eq!((one.grpc_status.as_str(), one.replies.len()), ("0", 1));
            assert_eq!(
                (one.replies[0].pod.as_str(), one.replies[0].text.as_str()),
                ("server", "hi")
            );
            let many = call("127.0.0.1", port, REPEAT, &request, &HeaderMap::new())
                .await
                .unwrap();
            assert_eq!(
                many.replies.iter().map(|r| r.number).collect::<Vec<_>>(),
                (1..=300).collect::<Vec<_>>()
            );
            let none = call("127.0.0.1", port, "/x.Y/Z", &request, &HeaderMap::new())
                .await
                .unwrap();
            assert_eq!(none.grpc_status, "12");
        };
        tokio::task::LocalSet::new().run_until(work).await;
    }
}
