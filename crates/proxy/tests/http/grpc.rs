//! gRPC-Web: clients that can read no trailers, in front of a gRPC server.

use std::{cell::RefCell, future::poll_fn, rc::Rc};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use outrigger_http::{Frame, Framing, Headers, ResponseHead, h2};
use tokio::{net::TcpListener, task::spawn_local};

use super::support::{Mesh, run};

const FILTERS: &str = "      - name: grpc_web
        typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb}
      - name: grpc_stats
        typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.grpc_stats.v3.FilterConfig, stats_for_all_methods: true}";

const TO_S: &str = "          - {match: {prefix: /}, route: {cluster: s-h2}}";

/// A message of gRPC.
fn message(text: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend((text.len() as u32).to_be_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

pub(crate) type Seen = Rc<RefCell<Vec<(String, Vec<u8>)>>>;

/// A server that answers with one message and a status, or where the path is `/s.S/No` with a status alone.
pub(crate) async fn server() -> (u16, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = Seen::default();
    let kept = seen.clone();
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let seen = kept.clone();
            spawn_local(async move {
                let settings = h2::Settings::default();
                let mut connection = h2::ServerConnection::handshake(stream, &settings)
                    .await
                    .unwrap();
                while let Ok(Some((head, mut reader, mut writer))) = connection.accept().await {
                    let seen = seen.clone();
                    spawn_local(async move {
                        let mut body = Vec::new();
                        while let Some(frame) = poll_fn(|cx| reader.poll_frame(cx)).await {
                            match frame {
                                Ok(Frame::Data(data)) => body.extend_from_slice(&data),
                                Ok(Frame::Trailers(_)) => {}
                                Err(_) => return,
                            }
                        }
                        seen.borrow_mut()
                            .push((format!("{} {:?}", head.path(), head.headers), body));
                        let mut response = ResponseHead::new(200);
                        response.headers.append("content-type", "application/grpc");
                        if head.path() == "/s.S/No" {
                            response.headers.append("grpc-status", "5");
                            writer.send_response(&response, Framing::None).unwrap();
                        } else {
                            writer.send_response(&response, Framing::Chunked).unwrap();
                            poll_fn(|cx| writer.poll_ready(cx)).await.unwrap();
                            writer.send_data(Bytes::from(message("pong"))).unwrap();
                            poll_fn(|cx| writer.poll_ready(cx)).await.unwrap();
                            let trailers: Headers =
                                [("grpc-status", "0"), ("x-t", "1")].into_iter().collect();
                            writer.send_end(Some(&trailers)).unwrap();
                        }
                        let _ = poll_fn(|cx| writer.poll_flush(cx)).await;
                    });
                }
            });
        }
    });
    (port, seen)
}

fn post(path: &str, kind: &str, body: &[u8]) -> String {
    // What is sent is text: bytes below 128 alone.
    format!(
        "POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: {kind}\r\nAccept: {kind}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{}",
        body.len(),
        std::str::from_utf8(body).unwrap()
    )
}

/// The head, and the body without its chunks.
async fn ask(mesh: &Mesh, request: &str) -> (String, Vec<u8>) {
    let answer = mesh.ask_bytes(request.as_bytes()).await;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, mut rest) = answer.split_at(end.expect("a whole head") + 4);
    let head = String::from_utf8(head.to_vec()).unwrap();
    if !head.contains("transfer-encoding: chunked") {
        return (head, rest.to_vec());
    }
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|two| two == b"\r\n").unwrap();
        let size = std::str::from_utf8(&rest[..line]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return (head, body);
        }
        body.extend_from_slice(&rest[line + 2..line + 2 + size]);
        rest = &rest[line + 4 + size..];
    }
}

#[test]
fn browsers_get_the_trailers_of_grpc_in_the_body() {
    run(async {
        let (port, seen) = server().await;
        let mesh = Mesh::new(TO_S, "", FILTERS, &[("s-h2", port)]).await;
        let end = b"\x80\x00\x00\x00\x16grpc-status:0\r\nx-t:1\r\n";

        let request = post("/s.S/Go", "application/grpc-web+proto", &message("ping"));
        let (head, body) = ask(&mesh, &request).await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(
            head.contains("content-type: application/grpc-web+proto\r\n"),
            "{head}"
        );
        assert_eq!(body, [&message("pong")[..], end].concat());

        // Pieces of base64 with a padding each, both ways.
        let ping = message("ping");
        let (one, two) = ping.split_at(4);
        let text = STANDARD.encode(one) + &STANDARD.encode(two);
        let request = post("/s.S/Go", "application/grpc-web-text", text.as_bytes());
        let (head, body) = ask(&mesh, &request).await;
        assert!(
            head.contains("content-type: application/grpc-web-text+proto\r\n"),
            "{head}"
        );
        let text = STANDARD.encode(message("pong")) + &STANDARD.encode(end);
        assert_eq!(String::from_utf8(body).unwrap(), text);

        // An answer that is a status alone has it in its head, which browsers can read.
        let request = post("/s.S/No", "application/grpc-web", &message("ping"));
        let (head, body) = ask(&mesh, &request).await;
        assert!(
            head.contains("content-type: application/grpc-web+proto\r\n"),
            "{head}"
        );
        assert!(
            head.contains("grpc-status: 5\r\n") && body.is_empty(),
            "{head}"
        );

        for (head, body) in seen.borrow().iter() {
            assert!(
                head.contains("\"content-type\": \"application/grpc\""),
                "{head}"
            );
            assert!(
                head.contains("\"te\": \"trailers\"") && !head.contains("content-length"),
                "{head}"
            );
            assert_eq!(*body, message("ping"));
        }
        let number = |name: &str| {
            mesh.server
                .store
                .number(&format!("cluster.s-h2.grpc.s.S.{name}"))
        };
        assert_eq!((number("Go.success"), number("No.failure")), (2, 1));
        assert_eq!(number("Go.request_message_count"), 2);
    });
}

#[test]
fn what_is_no_grpc_web_passes_as_it_is_and_what_is_no_base64_does_not() {
    run(async {
        let (port, seen) = server().await;
        let mesh = Mesh::new(TO_S, "", FILTERS, &[("s-h2", port)]).await;
        let (head, body) = ask(&mesh, &post("/s.S/Go", "application/grpc", b"a")).await;
        assert!(
            head.contains("content-type: application/grpc\r\n"),
            "{head}"
        );
        assert_eq!(body, message("pong"));
        assert_eq!(seen.borrow()[0].1, b"a");

        let (head, _) = ask(
            &mesh,
            &post("/s.S/Go", "application/grpc-web-text", b"no base64!"),
        )
        .await;
        // Said as gRPC says it: INTERNAL, as Envoy has it for 400.
        assert!(head.contains("grpc-status: 13\r\n"), "{head}");
        let log = mesh.log(2).await;
        assert!(
            log.contains("/s.S/Go 200 DPE grpc_base_64_decode_failed"),
            "{log}"
        );
    });
}
