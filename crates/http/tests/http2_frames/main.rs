//! HTTP/2 with a peer that says every frame by hand.

mod faults;
mod flow;
mod linger;
mod streams;

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use outrigger_http::{Frame, Framing, Method, RequestHead, ResponseHead, Version, h2};
use testkit::frames::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, POST, RST_STREAM,
    SETTINGS, WINDOW_UPDATE, frame,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf},
    task::spawn_local,
};

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

/// `(kind, flags, stream, payload)`.
type Seen = (u8, u8, u32, Vec<u8>);

struct Peer(DuplexStream);

impl Peer {
    async fn say(&mut self, frames: &[Vec<u8>]) {
        self.0.write_all(&frames.concat()).await.unwrap();
    }

    async fn next(&mut self) -> Option<Seen> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Some((head[3], head[4], stream, payload))
    }

    /// The next frame of a kind.
    async fn find(&mut self, kind: u8) -> Seen {
        loop {
            let seen = self.next().await.expect("the connection goes on");
            if seen.0 == kind {
                return seen;
            }
        }
    }
}

/// Counts the writes below a connection.
struct Counted(DuplexStream, Rc<Cell<usize>>);

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, to)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.1.set(self.1.get() + 1);
        Pin::new(&mut self.0).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A server that answers every request with its body's length, once it has all of it; at once where it is for `/early`.
async fn server_with(settings: h2::Settings) -> (Peer, Rc<Cell<usize>>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let writes = Rc::new(Cell::new(0));
    let io = Counted(far, writes.clone());
    spawn_local(async move {
        let mut server = h2::ServerConnection::handshake(io, &settings)
            .await
            .unwrap();
        while let Ok(Some((head, mut reader, mut writer))) = server.accept().await {
            if head.path() == "/drain" {
                server.drain();
            }
            spawn_local(async move {
                let mut length = 0;
                let early = head.path() == "/early";
                while !early && let Some(frame) = poll_fn(|cx| reader.poll_frame(cx)).await {
                    match frame {
                        Ok(Frame::Data(data)) => length += data.len(),
                        Ok(Frame::Trailers(_)) => {}
                        Err(_) => return,
                    }
                }
                let mut response = ResponseHead::new(200);
                response.headers.append("x-length", length.to_string());
                let _ = writer.send_response(&response, Framing::Chunked);
                let _ = writer.send_data(Bytes::from(vec![b'x'; 1000]));
                let _ = writer.send_end(None);
            });
        }
    });
    let mut peer = Peer(near);
    peer.0.write_all(h2::PREFACE).await.unwrap();
    peer.say(&[frame(SETTINGS, 0, 0, &[])]).await;
    (peer, writes)
}

async fn server() -> (Peer, Rc<Cell<usize>>) {
    server_with(h2::Settings::default()).await
}

/// A client, its driver running, and the server by hand.
async fn client() -> (h2::ClientHandle, Peer) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let (handle, driver) = h2::connect(near, &h2::Settings::default()).await.unwrap();
    spawn_local(driver);
    let mut peer = Peer(far);
    let mut preface = [0; 24];
    peer.0.read_exact(&mut preface).await.unwrap();
    assert_eq!(preface, h2::PREFACE);
    peer.say(&[frame(SETTINGS, 0, 0, &[])]).await;
    (handle, peer)
}

fn get(path: &str) -> RequestHead {
    RequestHead::new(Version::Http11, Method::Get, "host", path)
}
