//! What a client may say to our HTTP/1 server side, and what it may not. The numbers are those of
//! the list of bad inputs that the project keeps.

use std::io::Write;

use outrigger_http::{BodyReader, Error, Frame, Framing, Limits, ResponseHead, h1};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Feeds bytes to a server in pieces of `size`; the transcript has a line for each request that
/// was taken, with its body, and one for the end.
async fn transcript(bytes: &[u8], size: usize, limits: Limits) -> String {
    let (near, mut far) = tokio::io::duplex(1 << 20);
    let bytes = bytes.to_vec();
    let peer = tokio::spawn(async move {
        for piece in bytes.chunks(size) {
            if far.write_all(piece).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        // Only our direction ends; the other side is read so that nobody waits.
        let _ = far.shutdown().await;
        let _ = far.read_to_end(&mut Vec::new()).await;
    });
    let mut connection = h1::ServerConnection::new(near, Default::default(), limits);
    let mut out = Vec::new();
    loop {
        let head = match connection.read_head().await {
            Ok(Some(head)) => head,
            Ok(None) => break,
            Err(Error::Refused(refusal)) => {
                writeln!(out, "refused {}", refusal.status).unwrap();
                break;
            }
            Err(error) => {
                writeln!(out, "{error}").unwrap();
                break;
            }
        };
        write!(out, "{} {}", head.method.as_str(), head.path()).unwrap();
        let (reader, mut writer) = connection.split();
        let mut reader = BodyReader::H1(reader);
        let mut broken = false;
        while let Some(frame) = reader.frame().await {
            match frame {
                Ok(Frame::Data(data)) => {
                    write!(out, " {}", String::from_utf8_lossy(&data)).unwrap()
                }
                Ok(Frame::Trailers(trailers)) => write!(out, " {trailers:?}").unwrap(),
                Err(Error::Refused(refusal)) => {
                    write!(out, " refused {}", refusal.status).unwrap();
                    broken = true;
                    break;
                }
                Err(error) => {
                    write!(out, " {error}").unwrap();
                    broken = true;
                    break;
                }
            }
        }
        writeln!(out).unwrap();
        if broken {
            break;
        }
        writer.send_response(&ResponseHead::new(204), Framing::None);
        writer.send_end(None).unwrap();
        writer.flush().await.unwrap();
        if !connection.is_reusable() {
            break;
        }
    }
    drop(connection);
    peer.await.unwrap();
    // Pieces of a body are not part of what is compared.
    String::from_utf8(out).unwrap()
}

/// The transcript with all bytes at once; the same must come of single bytes, but for where bodies
/// are cut.
async fn serve(bytes: impl AsRef<[u8]>) -> String {
    let limits = Limits {
        trailers: true,
        ..Limits::default()
    };
    let whole = transcript(bytes.as_ref(), 1 << 20, limits.clone()).await;
    let single = transcript(bytes.as_ref(), 1, limits).await;
    let squeeze = |text: &str| text.replace(' ', "");
    assert_eq!(squeeze(&whole), squeeze(&single), "one byte at a time");
    whole
}

fn with(fields: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n")
}

#[tokio::test]
async fn good_requests_are_taken_and_follow_each_other() {
    let bytes = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\
        POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
        \r\nPOST /3 HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: Chunked\r\n\r\n\
        3;x=\"y\"\r\nabc\r\n00A\r\n0123456789\r\n0\r\nX-T: 1\r\nHost: evil\r\n\r\n\
        GET /4 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n\
        GET /5 HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(
        serve(bytes).await,
        "GET /1\nPOST /2 abc\nPOST /3 abc 0123456789 {\"X-T\": \"1\"}\nGET /4\n"
    );
}

#[tokio::test]
async fn lengths_that_two_readers_could_read_differently_are_refused() {
    // Cases 1 to 3.
    for fields in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        "Content-Length: 3\r\nContent-Length: 4\r\n",
        "Content-Length: 3\r\nContent-Length: 3\r\n",
        "Content-Length: 3, 3\r\n",
        "Content-Length: +1\r\n",
        "Content-Length: 1_0\r\n",
        "Content-Length: 0x10\r\n",
        "Content-Length: 010\r\n",
        "Content-Length: -48\r\n",
        "Content-Length: 1Z\r\n",
        "Content-Length:\r\n",
        "Content-Length: 99999999999999999999\r\n",
    ] {
        assert_eq!(serve(with(fields)).await, "refused 400\n", "{fields}");
    }
}

#[tokio::test]
async fn transfer_codings_other_than_chunked_are_refused() {
    // Cases 4 to 6.
    for coding in [
        ",chunked",
        "chunked,",
        "xchunked",
        "\x0bchunked",
        "identity, chunked",
        "gzip",
        "identity",
        "",
        "chunked, chunked",
    ] {
        let answer = serve(with(&format!("Transfer-Encoding: {coding}\r\n"))).await;
        assert!(
            matches!(&*answer, "refused 400\n" | "refused 501\n"),
            "{coding}: {answer}"
        );
    }
    let mut bytes =
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \xa0chunked\r\n\r\n".to_vec();
    assert_eq!(serve(&bytes).await, "refused 501\n");
    bytes = with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n").into();
    assert_eq!(serve(&bytes).await, "refused 501\n");
    let old = "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(serve(old).await, "refused 400\n");
}

#[tokio::test]
async fn chunks_that_are_not_are_refused() {
    // Cases 7 to 10.
    for body in [
        "0_2e\r\n",
        "0x5\r\n",
        "-0x0\r\n",
        "+5\r\n",
        " 5\r\nabcde\r\n",
        "\r\n",
        "5 \r\nabcde\r\n",
        "00000000000000005\r\nabcde\r\n",
        "ffffffffffffffff\r\n",
        "5\nabcde\r\n",
        "5\rXabcde\r\n",
        "5\r\r;abcde\r\n",
        "5\r\nabcdeX\r\n",
        "5\r\nabcde\n0\r\n\r\n",
        "5\r\nabcde\r\n\r\n0\r\n\r\n",
        "0\r\nX:\r\r\n",
        "0\r\n : x\r\n\r\n",
        "5;a\x00b\r\nabcde\r\n",
        "g\r\n",
    ] {
        let answer = serve(with("Transfer-Encoding: chunked\r\n") + body).await;
        assert!(answer.ends_with("refused 400\n"), "{body:?}: {answer}");
    }
}

/// A reply of our own looks whether the request is over: what was refused must not look like an end.
#[test]
fn what_is_refused_of_a_chunked_body_stays_refused() {
    for bytes in [
        "0\r\nX : y\r\n\r\n",
        "0\r\n X: y\r\n\r\n",
        "0\r\nX: a\r\n folded\r\n\r\n",
        "+5\r\n0\r\n\r\n",
        "1\r\naX0\r\n\r\n",
    ] {
        let mut decoder = h1::ChunkDecoder::new();
        let mut buffer = bytes::BytesMut::from(bytes);
        let limits = Limits::default();
        let refused = loop {
            match decoder.decode(&mut buffer, &limits) {
                Ok(h1::ChunkStep::Data(_)) => {}
                Ok(other) => panic!("{bytes:?}: {other:?}"),
                Err(refusal) => break refusal,
            }
        };
        let again = decoder.decode(&mut buffer, &limits);
        assert_eq!(again.expect_err("still refused"), refused, "{bytes:?}");
        assert!(!decoder.is_done());
    }
}

/// The largest size there is: what is reckoned with it has room.
#[tokio::test]
async fn a_chunk_may_claim_to_be_as_large_as_numbers_go() {
    let answer = serve(with("Transfer-Encoding: chunked\r\n") + "7fffffffffffffff\r\nab").await;
    assert!(answer.contains("POST / ab"), "{answer}");
}

#[tokio::test]
async fn what_is_spent_on_chunk_lines_and_trailers_is_limited() {
    // Cases 11 and 12.
    let head = with("Transfer-Encoding: chunked\r\n");
    let extensions = format!("1;{}\r\na\r\n", "x".repeat(100)).repeat(1000);
    assert!(
        transcript(
            (head.clone() + &extensions).as_bytes(),
            1 << 20,
            Limits::default()
        )
        .await
        .ends_with("refused 413\n")
    );
    let long = format!("1;{}\r\na\r\n", "x".repeat(10_000));
    assert!(serve(head.clone() + &long).await.ends_with("refused 413\n"));
    let tiny = "1\r\na\r\n".repeat(1000) + "0\r\n\r\n";
    let taken = transcript(
        (head.clone() + &tiny).as_bytes(),
        1 << 20,
        Limits::default(),
    )
    .await;
    assert_eq!(
        taken.matches('a').count(),
        1000,
        "small chunks alone are no attack"
    );
    let many = (0..200)
        .map(|n| format!("x-{n}: 1\r\n"))
        .collect::<String>();
    assert!(
        serve(head.clone() + "0\r\n" + &many + "\r\n")
            .await
            .ends_with("refused 431\n")
    );
    let large = format!("0\r\nx: {}\r\n\r\n", "x".repeat(70_000));
    let answer = transcript((head + &large).as_bytes(), 1 << 20, Limits::default()).await;
    assert!(answer.contains("refused 4"), "{answer}");
}

#[tokio::test]
async fn lines_and_names_that_are_not_what_they_seem_are_refused() {
    // Cases 13 to 16.
    for bytes in [
        "GET / HTTP/1.1\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: 1\n\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX\0: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n\tb\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\n",
        "GET / HTTP/1.1\r\n Host: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX\u{e9}: 1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX(): 1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX[]: 1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX{}: 1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\u{7f}b\r\n\r\n",
    ] {
        assert_eq!(serve(bytes).await, "refused 400\n", "{bytes:?}");
    }
}

#[tokio::test]
async fn start_lines_that_are_not_are_refused() {
    // Cases 17 to 19.
    for line in [
        "G=\":<>(e),[T] / HTTP/1.1",
        "G\0T / HTTP/1.1",
        "GET / HTTP/1.32",
        "GET / HTTP/2.0",
        "GET / HTTP/4294967295.255",
        "GET /",
        "GET / ",
        "GET ! HTTP/1.1",
        "GET / / HTTP/1.1",
        "GET\t/ HTTP/1.1",
        "GET  / HTTP/1.1",
        "GET a HTTP/1.1",
        "GET * HTTP/1.1",
        "GET http:// HTTP/1.1",
        "GET http://u@a/ HTTP/1.1",
        "GET ftp://a/ HTTP/1.1",
        "GET /\u{e9} HTTP/1.1",
        " GET / HTTP/1.1",
        "CONNECT / HTTP/1.1",
        "CONNECT a HTTP/1.1",
    ] {
        let answer = serve(format!("{line}\r\nHost: a\r\n\r\n")).await;
        // A version that is not spoken here; whatever else is wrong is no version.
        let status = match line.rsplit_once(" HTTP/").map(|(_, version)| version) {
            Some("1.32" | "2.0" | "4294967295.255") => 505,
            _ => 400,
        };
        assert_eq!(answer, format!("refused {status}\n"), "{line:?}");
    }
    for host in [
        "a\r\nHost: a",
        "a\0",
        "u@a",
        "a/b",
        "[fe80::1%eth0]",
        "a b",
        "a?b",
        "a\r\nhost: b",
    ] {
        let answer = serve(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(answer, "refused 400\n", "{host:?}");
    }
}

#[tokio::test]
async fn the_target_of_an_absolute_request_wins_over_its_host() {
    let bytes = b"GET http://b:81/x?y HTTP/1.1\r\nHost: a\r\n\r\n";
    let head = h1::parse_request(bytes, &Limits::default()).unwrap();
    assert_eq!(
        (head.authority(), head.path(), head.scheme()),
        ("b:81", "/x?y", "http")
    );
}

#[tokio::test]
async fn the_body_of_a_get_belongs_to_it() {
    // Case 20.
    let bytes = "GET /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nGET /\
        GET /2 HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(serve(bytes).await, "GET /1 GET /\nGET /2\n");
}

#[tokio::test]
async fn early_data_of_an_upgrade_is_held() {
    // Cases 21 and 22: what follows an upgrade is a request of its own until the upgrade is made.
    let bytes = "GET /1 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n\
        GET /2 HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(serve(bytes).await, "GET /1\nGET /2\n");
    let connect = "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 3\r\n\r\nabc";
    assert_eq!(serve(connect).await, "refused 400\n");
}

#[tokio::test]
async fn unknown_expectations_and_garbage_behind_a_body_fail_alone() {
    // Cases 24 and 28.
    assert_eq!(serve(with("Expect: 200-ok\r\n")).await, "refused 417\n");
    let bytes = with("Transfer-Encoding: chunked\r\n") + "1\r\na\r\n0\r\n\r\nX\r\n\r\n";
    assert_eq!(serve(bytes).await, "POST / a\nrefused 400\n");
}

#[tokio::test]
async fn heads_beyond_the_limits_are_refused() {
    // Case 30.
    let many = (0..101)
        .map(|n| format!("x-{n}: 1\r\n"))
        .collect::<String>();
    let large = format!("x: {}\r\n", "y".repeat(61 * 1024));
    for fields in [many, large] {
        let bytes = with(&fields);
        let answer = transcript(bytes.as_bytes(), 1 << 20, Limits::default()).await;
        assert_eq!(answer, "refused 431\n");
    }
}

#[tokio::test]
async fn what_connection_names_stays_here() {
    let bytes =
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x-secret, Host, close\r\nX-Secret: 1\r\n\
        Keep-Alive: 5\r\nTE: gzip, trailers\r\nUpgrade: h2c\r\n\r\n";
    let head = h1::parse_request(bytes, &Limits::default()).unwrap();
    let fields: Vec<_> = head.headers.iter().map(|(name, _)| name).collect();
    assert_eq!(fields, ["Host", "TE"]);
    assert_eq!(head.headers.get_str("te"), Some("trailers"));
    assert!(!head.keep_alive && !head.upgrade);
}
