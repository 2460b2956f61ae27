//! Calls that scripts make of clusters.

use super::*;

#[test]
fn a_script_calls_a_cluster_and_waits() {
    run(async {
        let script = "local function ask(handle, path, body)
  local headers, text = handle:httpCall('b',
    {[':method'] = 'POST', [':path'] = path, [':authority'] = 'lua', ['x-a'] = {'1', '2'}}, body, 5000)
  return headers, text
end
function envoy_on_request(handle)
  local headers, text = ask(handle, '/request', 'question')
  handle:headers():add('x-said', headers[':status'] .. headers['x-b'] .. text)
end
function envoy_on_response(handle)
  local headers, text = handle:httpCall('b',
    {[':method'] = 'GET', [':path'] = '/response', [':authority'] = 'lua'}, nil,
    {timeout_ms = 5000, return_duplicate_headers = true})
  handle:headers():add('x-said', headers['x-b'][2] .. tostring(text))
end";
        let a = Origin::new(&[OK]).await;
        let b = Origin::new(&[
            Act::Say("HTTP/1.1 201 Created\r\nX-B: y\r\nX-B: z\r\nContent-Length: 6\r\n\r\nanswer"),
            Act::Say("HTTP/1.1 200 OK\r\nX-B: y\r\nX-B: z\r\nContent-Length: 0\r\n\r\n"),
        ])
        .await;
        let filters = filter("lua", "", script);
        let mesh = Mesh::new(TO_A, "", &filters, &[("a", a.port), ("b", b.port)]).await;
        let answer = mesh.ask(GET).await;
        assert!(
            a.seen()[0].contains("x-said: 201zanswer\r\n"),
            "{}",
            a.seen()[0]
        );
        assert!(
            answer.contains("x-said: znil\r\n") && answer.ends_with("ok"),
            "{answer}"
        );
        let asked = b.seen();
        assert!(
            asked[0].starts_with("POST /request HTTP/1.1\r\nhost: lua\r\n"),
            "{}",
            asked[0]
        );
        assert!(
            asked[0].contains("x-a: 1\r\nx-a: 2\r\n") && asked[0].ends_with("\r\n\r\nquestion")
        );
        assert!(
            asked[1].starts_with("GET /response HTTP/1.1\r\n"),
            "{}",
            asked[1]
        );
        assert_eq!(number(&mesh, "errors"), 0);
    });
}

#[test]
fn a_call_that_fails_is_a_503_and_one_that_nobody_waits_for_is_made() {
    run(async {
        let script = "function envoy_on_request(handle)
  local head = {[':method'] = 'GET', [':path'] = '/', [':authority'] = 'lua'}
  local headers, text = handle:httpCall('b', head, nil, 50)
  handle:headers():add('x-said', headers[':status'] .. text)
  handle:headers():add('x-async', tostring(handle:httpCall('c', head, 'told', 1000, true)))
end";
        let a = Origin::new(&[OK]).await;
        let b = Origin::new(&[Act::Hang]).await;
        let c = Origin::new(&[OK]).await;
        let filters = filter("lua", "", script);
        let clusters = [("a", a.port), ("b", b.port), ("c", c.port)];
        let mesh = Mesh::new(TO_A, "", &filters, &clusters).await;
        mesh.ask(GET).await;
        let seen = &a.seen()[0];
        assert!(seen.contains("x-said: 503upstream failure\r\n"), "{seen}");
        assert!(seen.contains("x-async: nil\r\n"), "{seen}");
        within(async {
            while c.seen().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert!(c.seen()[0].ends_with("\r\n\r\ntold"));
    });
}

#[test]
fn a_client_that_leaves_ends_what_its_script_waits_for() {
    run(async {
        let script = "function envoy_on_request(handle)
  handle:httpCall('b', {[':method'] = 'GET', [':path'] = '/', [':authority'] = 'l'}, nil, 60000)
end";
        let b = Origin::new(&[Act::Hang]).await;
        let filters = filter("lua", "", script);
        let mesh = Mesh::new(TO_A, "", &filters, &[("a", b.port), ("b", b.port)]).await;
        let mut stream = mesh.connect().await;
        stream.write_all(GET.as_bytes()).await.unwrap();
        within(async {
            while b.seen().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        drop(stream);
        let log = mesh.log(1).await;
        assert!(log.contains("downstream_remote_disconnect"), "{log}");
    });
}
