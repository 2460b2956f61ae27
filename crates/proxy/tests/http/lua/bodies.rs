//! Bodies and trailers in scripts.

use super::*;

#[test]
fn a_body_is_read_and_replaced_on_both_ways() {
    run(async {
        let script = "function envoy_on_request(handle)
  local body = handle:body()
  handle:headers():add('x-body', body:length() .. body:getBytes(1, 3))
  local ok, why = pcall(body.getBytes, body, 3, 3)
  handle:headers():add('x-ok', tostring(ok))
  handle:headers():add('x-set', body:setBytes('good bye'))
end
function envoy_on_response(handle)
  local body = handle:body()
  body:setBytes(body:getBytes(0, body:length()):upper() .. '!')
end";
        for (request, act) in [
            (POST, OK),
            (
                "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
                OK,
            ),
            (POST, CHUNKED),
        ] {
            let (seen, answer, mesh) = once(script, request, act).await;
            assert!(
                seen.to_lowercase().contains("\r\ncontent-length: 8\r\n"),
                "{seen}"
            );
            assert!(!seen.to_lowercase().contains("transfer-encoding"), "{seen}");
            assert!(seen.contains("x-body: 5ell\r\n") && seen.contains("x-ok: false\r\n"));
            assert!(
                seen.contains("x-set: 8\r\n") && seen.ends_with("\r\n\r\ngood bye"),
                "{seen}"
            );
            let (length, body) = if matches!(act, Act::Say(text) if text.contains("Length: 2")) {
                (3, "OK!")
            } else {
                (6, "ABCDE!")
            };
            let lower = answer.to_lowercase();
            assert!(
                lower.contains(&format!("\r\ncontent-length: {length}\r\n")),
                "{answer}"
            );
            assert!(!lower.contains("transfer-encoding"), "{answer}");
            assert!(answer.ends_with(&format!("\r\n\r\n{body}")), "{answer}");
            assert_eq!(number(&mesh, "errors"), 0);
        }
    });
}

#[test]
fn a_body_that_is_not_there_is_nil_unless_it_is_wanted() {
    run(async {
        let script = "function envoy_on_request(handle)
  handle:headers():add('x-nil', tostring(handle:body()))
  local body = handle:body(true)
  handle:headers():add('x-length', body:length())
  body:setBytes('made')
end";
        let (seen, _, _) = once(script, GET, OK).await;
        assert!(
            seen.contains("x-nil: nil\r\n") && seen.contains("x-length: 0\r\n"),
            "{seen}"
        );
        assert!(
            seen.contains("content-length: 4\r\n") && seen.ends_with("\r\n\r\nmade"),
            "{seen}"
        );
        let script = "function envoy_on_response(handle)
  handle:body(true):setBytes('made')
end";
        let empty = Act::Say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        let (_, answer, _) = once(script, GET, empty).await;
        assert!(answer.ends_with("\r\n\r\nmade"), "{answer}");
        let head = GET.replace("GET", "HEAD");
        let (_, answer, _) = once(script, &head, empty).await;
        assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    });
}

#[test]
fn replies_of_the_proxy_are_changed_as_well() {
    run(async {
        let script = "function envoy_on_response(handle)
  handle:body(true):setBytes('own')
  handle:headers():replace('content-type', 'text/plain')
end";
        let filters = filter("lua", "", script);
        let mesh = Mesh::new(TO_A, "", &filters, &[]).await;
        for (request, body) in [
            (GET.to_owned(), "own"),
            (GET.replace("GET", "HEAD"), ""),
            (
                GET.replace("X-Gone: 1", "Content-Type: application/grpc"),
                "own",
            ),
        ] {
            let answer = mesh.ask(&request).await;
            assert!(answer.contains("content-length: 3\r\n"), "{answer}");
            assert!(answer.ends_with(&format!("\r\n\r\n{body}")), "{answer}");
        }
        assert_eq!(number(&mesh, "errors"), 0);
    });
}

#[test]
fn bodies_have_the_connections_limit() {
    run(async {
        let script = "function envoy_on_request(handle) handle:body() end
function envoy_on_response(handle) handle:body() end";
        let filters = filter("lua", "", script);
        let origin = Origin::new(&[Act::Say(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n",
        )])
        .await;
        let routes =
            "          - {match: {prefix: /}, request_body_buffer_limit: 5, route: {cluster: a}}";
        let mesh = Mesh::new(routes, "", &filters, &[("a", origin.port)]).await;
        let long = POST.replace("Content-Length: 5", "Content-Length: 6") + "!";
        assert!(mesh.ask(&long).await.starts_with("HTTP/1.1 413 "));
        let answer = mesh.ask(POST).await;
        assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
        assert!(answer.ends_with("Internal Server Error"), "{answer}");
        let store = &mesh.server.store;
        assert_eq!(store.number("http.test.downstream_rq_too_large"), 1);
        assert_eq!(store.number("http.test.rs_too_large"), 1);
        let log = mesh.log(2).await;
        assert!(
            log.contains("POST / 500 - response_payload_too_large 1"),
            "{log}"
        );
    });
}

#[test]
fn pieces_of_a_body_go_by() {
    run(async {
        let script = "function envoy_on_request(handle)
  local all = ''
  for chunk in handle:bodyChunks() do
    all = all .. chunk:getBytes(0, chunk:length())
  end
  local ok, why = pcall(function() handle:headers():add('a', 'b') end)
  handle:streamInfo():dynamicMetadata():set('x', 'all', all .. ' ' .. tostring(ok))
end
function envoy_on_response(handle)
  handle:headers():add('x-all', handle:streamInfo():dynamicMetadata():get('x').all)
  for chunk in handle:bodyChunks() do
    chunk:setBytes('<' .. chunk:getBytes(0, chunk:length()) .. '>')
  end
end";
        let (seen, answer, mesh) = once(script, POST, OK).await;
        assert!(seen.ends_with("\r\n5\r\nhello\r\n0\r\n\r\n"), "{seen}");
        assert!(answer.contains("x-all: hello false\r\n"), "{answer}");
        assert!(
            answer
                .to_lowercase()
                .contains("transfer-encoding: chunked\r\n"),
            "{answer}"
        );
        assert!(
            answer.contains("<ok>") && answer.ends_with("\r\n0\r\n\r\n"),
            "{answer}"
        );
        assert_eq!(number(&mesh, "errors"), 0);
    });
}

#[test]
fn a_body_is_replaced_without_being_held() {
    run(async {
        // In the style of the filter's documentation.
        let script = "function envoy_on_response(response_handle)
  response_handle:headers():replace('content-type', 'text/html')
  local last
  for chunk in response_handle:bodyChunks() do
    chunk:setBytes('')
    last = chunk
  end
  last:setBytes('<html><b>Not Found</b></html>')
end";
        for act in [OK, CHUNKED] {
            let (_, answer, mesh) = once(script, GET, act).await;
            assert!(
                answer.contains("\r\n\r\n1d\r\n<html><b>Not Found</b></html>\r\n0\r\n\r\n"),
                "{answer}"
            );
            assert_eq!(number(&mesh, "errors"), 0);
        }
    });
}

#[test]
fn trailers_are_read_and_changed() {
    run(async {
        let request = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: x-t\r\nConnection: close\r\nTE: trailers\r\n\r\n2\r\nhi\r\n0\r\nX-T: 1\r\n\r\n";
        for read in [
            "handle:body()",
            "for chunk in handle:bodyChunks() do end",
            "",
        ] {
            let phase = format!(
                "(handle)
  {read}
  local t = handle:trailers()
  t:add('x-more', t:get('x-t') .. '!')
  t:remove('x-t')
end
"
            );
            let script =
                format!("function envoy_on_request{phase}function envoy_on_response{phase}");
            let options = "http_protocol_options: {enable_trailers: true}";
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let filters = filter("lua", "", &script);
            let cluster = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http_protocol_options: {enable_trailers: true}}}}";
            let mesh = Mesh::with(TO_A, options, &filters, &[("a", port)], cluster).await;
            let origin = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut seen = String::new();
                while !(seen.contains("\r\n0\r\n") && seen.ends_with("\r\n\r\n")) {
                    let mut bytes = [0; 4096];
                    let count = stream.read(&mut bytes).await.unwrap();
                    assert!(count > 0, "{seen}");
                    seen.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
                }
                stream.write_all(TRAILERS.as_bytes()).await.unwrap();
                seen
            };
            let (answer, seen) = within(async { tokio::join!(mesh.ask(request), origin) }).await;
            assert!(seen.ends_with("0\r\nx-more: 1!\r\n\r\n"), "{read}: {seen}");
            assert!(
                answer.ends_with("0\r\nx-more: 1!\r\n\r\n"),
                "{read}: {answer}"
            );
            assert_eq!(number(&mesh, "errors"), 0, "{read}");
        }
        let (seen, _, _) = once(
            "function envoy_on_request(h) h:body() h:headers():add('x-t', tostring(h:trailers())) end",
            POST,
            OK,
        )
        .await;
        assert!(seen.contains("x-t: nil\r\n"), "{seen}");
    });
}
