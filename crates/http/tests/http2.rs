//! HTTP/2 between our two sides, in the same words as HTTP/1.

use bytes::Bytes;
use outrigger_http::{
    BodyReader, BodyWriter, Error, Frame, Framing, Headers, Method, RequestHead, ResponseHead,
    Version, h2,
};
use tokio::io::DuplexStream;

type Reader = BodyReader<'static, DuplexStream>;
type Writer = BodyWriter<'static, DuplexStream>;

/// A client on a connection whose streams `serve` answers.
async fn connection<F>(
    serve: impl Fn(RequestHead, Reader, Writer) -> F + 'static,
) -> h2::ClientHandle
where
    F: Future<Output = ()> + 'static,
{
    let (near, far) = tokio::io::duplex(1 << 16);
    tokio::task::spawn_local(async move {
        let mut server = h2::ServerConnection::handshake(far, &h2::Settings::default())
            .await
            .unwrap();
        while let Ok(Some((head, reader, writer))) = server.accept().await {
            tokio::task::spawn_local(serve(head, BodyReader::H2(reader), BodyWriter::H2(writer)));
        }
    });
    let (handle, driver) = h2::connect(near, &h2::Settings::default()).await.unwrap();
    tokio::task::spawn_local(driver);
    handle
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

async fn body(reader: &mut h2::Reader) -> (Vec<u8>, Option<Headers>) {
    let (mut all, mut trailers) = (Vec::new(), None);
    while let Some(frame) = std::future::poll_fn(|cx| reader.poll_frame(cx)).await {
        match frame.unwrap() {
            Frame::Data(data) => all.extend_from_slice(&data),
            Frame::Trailers(found) => trailers = Some(found),
        }
    }
    (all, trailers)
}

#[test]
fn heads_bodies_larger_than_a_window_and_trailers_come_through() {
    run(async {
        let mut client = connection(async |head, mut reader, mut writer| {
            assert_eq!(head.version, Version::Http2);
            assert_eq!(
                (head.authority(), head.path(), head.scheme()),
                ("host:1", "/p?q", "http")
            );
            assert_eq!(head.headers.get_str("cookie"), Some("a=1; b=2"));
            let mut response = ResponseHead::new(200);
            response.headers.append("x-method", head.method.as_str());
            // What belongs to one connection is not said on another.
            response.headers.append("connection", "close");
            writer.send_response(&response, Framing::Chunked).unwrap();
            let mut length = 0;
            while let Some(frame) = reader.frame().await {
                if let Frame::Data(data) = frame.unwrap() {
                    length += data.len();
                    std::future::poll_fn(|cx| writer.poll_ready(cx))
                        .await
                        .unwrap();
                    writer.send_data(data).unwrap();
                }
            }
            let trailers = [("grpc-status", "0"), ("x-length", &*length.to_string())];
            std::future::poll_fn(|cx| writer.poll_ready(cx))
                .await
                .unwrap();
            writer
                .send_end(Some(&trailers.into_iter().collect()))
                .unwrap();
        })
        .await;
        client.ready().await.unwrap();
        let mut head = RequestHead::new(Version::Http11, Method::Post, "host:1", "/p?q");
        head.headers.append("cookie", "a=1");
        head.headers.append("cookie", "b=2");
        let (mut response, mut writer) = client.send(&head, Framing::Chunked).unwrap().split();
        let sent: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        let pieces = sent.clone();
        let sender = tokio::task::spawn_local(async move {
            for piece in pieces.chunks(70_000) {
                std::future::poll_fn(|cx| writer.poll_ready(cx))
                    .await
                    .unwrap();
                writer.send_data(Bytes::copy_from_slice(piece)).unwrap();
            }
            std::future::poll_fn(|cx| writer.poll_ready(cx))
                .await
                .unwrap();
            writer.send_end(None).unwrap();
        });
        let (head, reader) = response.read_head().await.unwrap();
        assert_eq!(head.headers.get_str("x-method"), Some("POST"));
        assert!(!head.headers.contains("connection"));
        let (got, trailers) = body(&mut reader.unwrap()).await;
        sender.await.unwrap();
        assert_eq!(got, sent);
        assert_eq!(trailers.unwrap().get_str("x-length"), Some("200000"));
    });
}

#[test]
fn a_refused_stream_is_known_not_to_have_been_processed() {
    run(async {
        let mut client = connection(async |_, _, mut writer| {
            writer.reset(h2::Reason::REFUSED_STREAM);
        })
        .await;
        client.ready().await.unwrap();
        let head = RequestHead::new(Version::Http11, Method::Get, "host", "/");
        let (mut response, _writer) = client.send(&head, Framing::None).unwrap().split();
        let error = response.read_head().await.unwrap_err();
        assert!(error.is_unprocessed(), "{error}");
    });
}

#[test]
fn informational_heads_come_before_the_final_one() {
    run(async {
        let mut client = connection(async |_, _, mut writer| {
            let hints = [("link", "</a>")].into_iter().collect();
            writer.send_informational(103, &hints).unwrap();
            writer
                .send_response(&ResponseHead::new(204), Framing::None)
                .unwrap();
        })
        .await;
        client.ready().await.unwrap();
        let head = RequestHead::new(Version::Http11, Method::Get, "host", "/");
        let (mut response, _writer) = client.send(&head, Framing::None).unwrap().split();
        let (first, reader) = response.read_head().await.unwrap();
        assert_eq!(
            (first.status, first.headers.get_str("link")),
            (103, Some("</a>"))
        );
        assert!(reader.is_none());
        let (last, _) = response.read_head().await.unwrap();
        assert_eq!(last.status, 204);
    });
}

#[test]
fn a_head_that_http2_cannot_say_is_refused_before_it_is_sent() {
    run(async {
        let mut client = connection(async |_, _, _| {}).await;
        client.ready().await.unwrap();
        let head = RequestHead::new(Version::Http11, Method::Get, "host", "no slash");
        let error = client.send(&head, Framing::None).unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error}");
    });
}
