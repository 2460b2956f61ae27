//! Scripts on requests and responses.

mod bodies;
mod calls;

use std::time::Duration;

use outrigger_proxy::server::Change;
use testkit::envoy::message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::support::{Act, Mesh, OK, Origin, TO_A, run, within};

const TYPE: &str = "\"@type\": type.googleapis.com/envoy.extensions.filters.http.lua.v3";

/// A filter with a script.
fn filter(name: &str, further: &str, script: &str) -> String {
    let script = script.replace('\n', "\n              ");
    format!(
        "      - name: {name}
        typed_config:
          {TYPE}.Lua
          {further}
          default_source_code:
            inline_string: |
              {script}
"
    )
}

async fn mesh(script: &str, origin: &Origin) -> Mesh {
    Mesh::new(TO_A, "", &filter("lua", "", script), &[("a", origin.port)]).await
}

fn number(mesh: &Mesh, stat: &str) -> i64 {
    mesh.server.store.number(&format!("http.test.lua.{stat}"))
}

/// What a script's request looks like to the origin, and the answer.
async fn once(script: &str, request: &str, act: Act) -> (String, String, Mesh) {
    let origin = Origin::new(&[act]).await;
    let mesh = mesh(script, &origin).await;
    let answer = mesh.ask(request).await;
    let seen = origin.seen().first().cloned().unwrap_or_default();
    (seen, answer, mesh)
}

const GET: &str = "GET /p?q=1 HTTP/1.1\r\nHost: h\r\nX-Two: a\r\nX-Two: b\r\nX-Gone: 1\r\nConnection: close\r\n\r\n";
const POST: &str =
    "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
const CHUNKED: Act = Act::Say(
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
);
const TRAILERS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-t\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n";

#[test]
fn request_headers_are_read_and_changed() {
    run(async {
        let script = "function envoy_on_request(handle)
  local h = handle:headers()
  h:add('x-get', h:get('X-Two') .. '|' .. tostring(h:get('x-none')))
  h:add('x-at', h:getAtIndex('x-two', 1) .. tostring(h:getAtIndex('x-two', 2)))
  h:add('x-num', h:getNumValues('x-two') .. h:getNumValues('x-none'))
  h:add('x-pseudo', h:get(':method') .. h:get(':path') .. h:get(':authority') .. h:get(':scheme'))
  h:remove('x-gone')
  h:replace('x-two', 'c')
  h:replace('x-new', 7)
  h:add('x-two', 'd')
  h:replace(':path', '/other')
  h:replace(':authority', 'else')
  h:replace(':method', 'PUT')
  h:replace('content-length', '99')
  local all = {}
  for name, value in pairs(h) do
    if name:sub(1, 2) ~= 'x-' or name == 'x-two' then all[#all + 1] = name .. '=' .. value end
  end
  h:add('x-all', table.concat(all, ' '))
end";
        let (seen, answer, mesh) = once(script, GET, OK).await;
        assert!(
            seen.starts_with("PUT /other HTTP/1.1\r\nHost: else\r\n"),
            "{seen}"
        );
        for line in [
            "x-get: a,b|nil",
            "x-at: bnil",
            "x-num: 20",
            "x-pseudo: GET/p?q=1hhttp",
            "X-Two: c",
            "x-two: d",
            "x-new: 7",
            "x-all: :authority=else :path=/other :method=PUT :scheme=http x-two=c x-two=d",
        ] {
            assert!(seen.contains(&format!("\r\n{line}\r\n")), "{line}: {seen}");
        }
        let lower = seen.to_lowercase();
        assert!(
            !lower.contains("x-gone") && !lower.contains("content-length: 99"),
            "{seen}"
        );
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert_eq!(
            (number(&mesh, "executions"), number(&mesh, "errors")),
            (1, 0)
        );
    });
}

#[test]
fn response_headers_are_changed_with_status_and_phrase() {
    run(async {
        let script = "function envoy_on_response(handle)
  local h = handle:headers()
  h:add('x-was', h:get(':status'))
  h:replace(':status', '404')
  h:setHttp1ReasonPhrase('Not Here')
  h:remove('server')
end";
        let (_, answer, _) = once(script, GET, OK).await;
        assert!(answer.starts_with("HTTP/1.1 404 Not Here\r\n"), "{answer}");
        assert!(answer.contains("x-was: 200\r\n") && answer.ends_with("\r\n\r\nok"));
    });
}

#[test]
fn a_script_answers() {
    run(async {
        let script = "function envoy_on_request(handle)
  handle:respond({[':status'] = '403', ['X-A'] = {'1', '2'}, ['content-type'] = 'text/html'}, 'nope')
  error('never reached')
end
function envoy_on_response(handle)
  handle:headers():add('x-seen', tostring(handle:body():getBytes(0, 4)))
end";
        let (seen, answer, mesh) = once(script, GET, OK).await;
        assert_eq!(seen, "");
        assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
        for line in [
            "x-a: 1",
            "x-a: 2",
            "content-type: text/html",
            "content-length: 4",
            "x-seen: nope",
        ] {
            assert!(
                answer.contains(&format!("\r\n{line}\r\n")),
                "{line}: {answer}"
            );
        }
        assert!(answer.ends_with("\r\n\r\nnope"));
        assert_eq!(mesh.log(1).await, "GET /p?q=1 403 - lua_response 0\n");
        assert_eq!(
            (number(&mesh, "executions"), number(&mesh, "errors")),
            (2, 0)
        );
    });
}

#[test]
fn what_a_script_may_not_is_an_error_and_the_stream_goes_on() {
    run(async {
        for (script, wrong) in [
            (
                "handle:headers():add('x-a', 'b\\r\\nc: d')",
                "control characters",
            ),
            ("handle:headers():add('x a', 'b')", "is no name of a header"),
            (
                "handle:headers():remove(':path')",
                ":path cannot be removed",
            ),
            (
                "handle:headers():replace(':path', 'no slash')",
                ":path cannot be",
            ),
            (
                "handle:headers():replace(':nonsense', '1')",
                ":nonsense cannot be",
            ),
            ("handle:respond({[':status'] = '99'})", "between 200-599"),
            ("handle:respond({['x'] = '99'})", "between 200-599"),
            ("handle:respond('x')", "a table is expected"),
            (
                "handle:httpCall('none', {[':path'] = '/', [':method'] = 'GET', [':authority'] = 'a'}, nil, 10)",
                "there is no cluster none",
            ),
            (
                "handle:httpCall('a', {[':path'] = '/'}, nil, 10)",
                "must include",
            ),
            (
                "handle:httpCall('a', {[':path'] = '/', [':method'] = 'GET', [':authority'] = 'a'}, nil, -1)",
                "timeout must be >= 0",
            ),
            (
                "handle:httpCall('a', {[':path'] = '/', [':method'] = 'GET', [':authority'] = 'a'}, nil, {what = 1})",
                "is not valid key",
            ),
            ("coroutine.yield()", "script performed an unexpected yield"),
            ("while true do end", "an endless loop?"),
            (
                "local s = 'x' while true do s = s .. s end",
                "not enough memory",
            ),
            ("local x = nil .. 'a'", "attempt to concatenate"),
            ("handle:nothing()", "nothing"),
            ("handle.headers()", "argument"),
            ("handle:headers():get()", "argument"),
            ("os.execute('true')", "attempt to call"),
            (
                "handle:streamInfo():dynamicMetadata():set('a', 'b', print)",
                "unexpected type 'function'",
            ),
            (
                "local t = {} t.t = t handle:streamInfo():dynamicMetadata():set('a', 'b', t)",
                "deeper than 32",
            ),
        ] {
            // The script sees what is wrong; what it does not catch is counted.
            let text = format!(
                "function envoy_on_request(handle)
  local ok, why = pcall(function() {script} end)
  handle:headers():add('x-why', (tostring(why):gsub('%c', ' ')))
  {script}
end"
            );
            let (seen, answer, mesh) = once(&text, GET, OK).await;
            assert!(answer.ends_with("\r\n\r\nok"), "{script}: {answer}");
            assert_eq!(number(&mesh, "errors"), 1, "{script}: {seen}");
            let endless = ["while", "coroutine"]
                .iter()
                .any(|word| script.starts_with(word));
            assert!(endless || seen.contains(wrong), "{script}: {seen}");
        }
    });
}

#[test]
fn an_endless_script_ends_in_every_phase() {
    run(async {
        let script = "function envoy_on_request(handle)
  handle:httpCall('a', {[':path'] = '/', [':method'] = 'GET', [':authority'] = 'a'}, nil, 1000)
  while true do pcall(function() while true do end end) end
end
function envoy_on_response(handle)
  coroutine.wrap(function() while true do end end)()
end";
        let origin = Origin::new(&[OK, OK, OK, OK]).await;
        let mesh = mesh(script, &origin).await;
        for asked in 1..=2 {
            assert!(mesh.get("/").await.ends_with("\r\n\r\nok"));
            assert_eq!(number(&mesh, "errors"), 2 * asked);
        }
    });
}

#[test]
fn objects_end_with_their_script_and_with_each_wait() {
    run(async {
        let script = "local kept, handle_kept
function envoy_on_request(handle)
  if kept then
    local ok, why = pcall(function() return kept:get('host') end)
    handle:headers():add('x-kept', why)
    ok, why = pcall(function() return handle_kept:headers() end)
    handle:headers():add('x-handle', why)
    ok, why = pcall(function() return handle_kept:body() end)
    handle:headers():add('x-body', why)
    return
  end
  kept, handle_kept = handle:headers(), handle
  handle:body()
  local ok, why = pcall(function() return kept:get('host') end)
  handle:headers():add('x-kept', why)
end";
        let origin = Origin::new(&[OK, OK]).await;
        let mesh = mesh(script, &origin).await;
        mesh.ask(POST).await;
        mesh.get("/").await;
        let seen = origin.seen();
        let dead = "object used outside of proper scope";
        assert!(seen[0].contains(dead), "{}", seen[0]);
        assert_eq!(seen[1].matches(dead).count(), 3, "{}", seen[1]);
        assert_eq!(number(&mesh, "errors"), 0);
    });
}

#[test]
fn metadata_context_and_stream_are_told() {
    run(async {
        let script = "function envoy_on_request(handle)
  local h, m = handle:headers(), handle:metadata()
  local names = {}
  for name in pairs(m) do names[#names + 1] = name end
  table.sort(names)
  h:add('x-meta', m:get('text') .. m:get('list')[2] .. tostring(m:get('map').deep.yes) .. table.concat(names, ','))
  h:add('x-context', handle:filterContext()['key'])
  local info = handle:streamInfo()
  h:add('x-info', info:protocol() .. ' ' .. info:routeName() .. ' ' .. info:virtualClusterName() .. info:requestedServerName())
  h:add('x-address', tostring(info:downstreamLocalAddress():match('^127.0.0.1:%d+$') ~= nil) ..
    tostring(info:downstreamDirectRemoteAddress() == info:downstreamRemoteAddress()))
  h:add('x-ssl', tostring(handle:connection():ssl()) .. tostring(info:downstreamSslConnection()))
  h:add('x-base64', handle:base64Escape('\\0binary'))
  local R = EnvoyTimestampResolution
  h:add('x-time', tostring(handle:timestamp() > 1.7e12 and handle:timestamp(R.MICROSECOND) > 1.7e15
    and #handle:timestampString() == 13 and #handle:timestampString(R.MICROSECOND) == 16))
  local d = info:dynamicMetadata()
  d:set('my', 'value', {1, 'two', {three = true}})
  d:set('my', 'other', nil)
  d:set('your', 'n', 0.5)
  h:add('x-typed', tostring(info:dynamicTypedMetadata('a')) .. tostring(info:filterState():get('a')))
  h:add('x-connection', tostring(handle:connectionStreamInfo():dynamicMetadata():get('a')))
end
function envoy_on_response(handle)
  local d = handle:streamInfo():dynamicMetadata()
  local my = d:get('my')
  local names = {}
  for name in pairs(d) do names[#names + 1] = name end
  handle:headers():add('x-my', my.value[2] .. tostring(my.value[3].three) .. tostring(my.other) .. d:get('your').n)
  handle:headers():add('x-names', table.concat(names, ','):len())
end";
        let routes = format!(
            "          - match: {{prefix: /}}
            name: the-route
            metadata: {{filter_metadata: {{lua: {{text: t, list: [1, 2], map: {{deep: {{yes: true}}}}}}}}}}
            typed_per_filter_config: {{lua: {{{TYPE}.LuaPerRoute, filter_context: {{key: value}}}}}}
            route: {{cluster: a}}"
        );
        let origin = Origin::new(&[OK]).await;
        let filters = filter("lua", "", script);
        let mesh = Mesh::new(&routes, "", &filters, &[("a", origin.port)]).await;
        let answer = mesh.ask(GET).await;
        let seen = origin.seen().first().cloned().unwrap_or_default();
        for line in [
            "x-meta: t2truelist,map,text",
            "x-context: value",
            "x-info: HTTP/1.1 the-route ",
            "x-address: truetrue",
            "x-ssl: nilnil",
            "x-base64: AGJpbmFyeQ==",
            "x-time: true",
            "x-typed: nilnil",
            "x-connection: nil",
        ] {
            assert!(seen.contains(&format!("\r\n{line}")), "{line}: {seen}");
        }
        assert!(answer.contains("x-my: twotruenil0.5\r\n"), "{answer}");
        assert!(answer.contains("x-names: 7\r\n"), "{answer}");
        assert_eq!(number(&mesh, "errors"), 0);
    });
}

#[test]
fn signatures_are_verified_with_keys_that_a_script_has() {
    run(async {
        let pair = rcgen::KeyPair::generate().unwrap();
        let escaped =
            |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("\\{byte:03}")).collect() };
        let key = escaped(&rcgen::PublicKeyData::subject_public_key_info(&pair));
        let signature = escaped(&rcgen::SigningKey::sign(&pair, b"some data").unwrap());
        let script = format!(
            "local der, signature = '{key}', '{signature}'
function envoy_on_request(handle)
  local key = handle:importPublicKey(der, #der)
  local h = handle:headers()
  for index, given in ipairs({{
    {{'sha256', 'some data'}}, {{'SHA256', 'some date'}}, {{'md5', 'some data'}},
  }}) do
    local ok, why = handle:verifySignature(given[1], key, signature, #signature, given[2], #given[2])
    h:add('x-' .. index, tostring(ok) .. why)
  end
  h:add('x-key', tostring(key:get() == der) .. tostring(handle:importPublicKey('', 0):get()))
  h:add('x-length', tostring(pcall(handle.importPublicKey, handle, der, #der + 1)))
end"
        );
        let (seen, _, mesh) = once(&script, GET, OK).await;
        for line in [
            "x-1: true",
            "x-2: falseFailed to verify digest.",
            "x-3: falsemd5 is not supported.",
            "x-key: truenil",
            "x-length: false",
        ] {
            assert!(seen.contains(&format!("\r\n{line}\r\n")), "{line}: {seen}");
        }
        assert_eq!(number(&mesh, "errors"), 0);
    });
}

#[test]
fn a_script_chooses_the_host() {
    run(async {
        let (one, two) = (Origin::new(&[]).await, Origin::new(&[OK, OK]).await);
        let script = format!(
            "function envoy_on_request(handle)
  handle:setUpstreamOverrideHost('127.0.0.1:{}', true)
  local ok, why = pcall(handle.setUpstreamOverrideHost, handle, 'name', true)
  handle:headers():add('x-why', why)
end",
            two.port
        );
        let cluster = |port: u16| {
            format!(
                "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}"
            )
        };
        let both = format!(
            "name: both\ntype: STATIC\nload_assignment: {{cluster_name: both, endpoints: [{{lb_endpoints: [{}, {}]}}]}}",
            cluster(one.port),
            cluster(two.port)
        );
        let filters = filter("lua", "", &script);
        let routes = TO_A.replace("cluster: a", "cluster: both");
        let mesh = Mesh::new(&routes, "", &filters, &[]).await;
        let plan = outrigger_proxy::plan::Cluster::try_from(&message::<
            proto::envoy::config::cluster::v3::Cluster,
        >(&both));
        let change = Change::UpsertCluster(std::sync::Arc::new(plan.unwrap().into()));
        for result in mesh.server.apply(vec![change]) {
            result.unwrap();
        }
        mesh.server.settled().await;
        for _ in 0..2 {
            assert!(mesh.get("/").await.ends_with("ok"));
        }
        let seen = two.seen();
        assert_eq!(seen.len(), 2);
        assert!(
            seen[0].contains("host is not a valid IP address"),
            "{}",
            seen[0]
        );
    });
}

#[test]
fn routes_choose_the_script_and_scripts_the_route() {
    run(async {
        let script = "function envoy_on_request(handle)
  handle:headers():add('x-script', 'default')
  if handle:headers():get('x-to') then handle:headers():replace(':path', '/b') end
end";
        let named = "source_codes: {two: {inline_string: \"function envoy_on_request(h) h:headers():add('x-script', 'two') end\"}}";
        let per_route = |path: &str, what: &str| {
            format!(
                "          - match: {{prefix: {path}}}
            typed_per_filter_config: {{lua: {{{TYPE}.LuaPerRoute, {what}}}}}
            route: {{cluster: a}}\n"
            )
        };
        let routes = [
            per_route("/off", "disabled: true"),
            per_route("/two", "name: two"),
            per_route("/none", "name: nobody"),
            per_route(
                "/own",
                "source_code: {inline_string: \"function envoy_on_request(h) h:headers():add('x-script', 'own') end\"}",
            ),
            "          - {match: {prefix: /b}, route: {cluster: b}}\n".to_owned(),
            TO_A.to_owned(),
        ]
        .concat();
        let a = Origin::new(&[OK; 5]).await;
        let b = Origin::new(&[OK]).await;
        let filters = filter("lua", named, script);
        let mesh = Mesh::new(&routes, "", &filters, &[("a", a.port), ("b", b.port)]).await;
        for path in ["/off", "/two", "/none", "/own", "/"] {
            mesh.get(path).await;
        }
        let scripts: Vec<_> = a
            .seen()
            .iter()
            .map(|seen| {
                let line = seen
                    .lines()
                    .find_map(|line| line.strip_prefix("x-script: "));
                line.unwrap_or("-").to_owned()
            })
            .collect();
        assert_eq!(scripts, ["-", "two", "-", "own", "default"]);
        mesh.ask("GET / HTTP/1.1\r\nHost: h\r\nX-To: b\r\nConnection: close\r\n\r\n")
            .await;
        assert_eq!(b.seen().len(), 1);
    });
}

#[test]
fn two_filters_have_two_scripts() {
    run(async {
        let script = |name: &str| {
            format!(
                "local count = 0
function envoy_on_request(handle)
  count = count + 1
  local body = handle:body()
  body:setBytes(body:getBytes(0, body:length()) .. '{name}' .. count)
end
function envoy_on_response(handle)
  local body = handle:body()
  body:setBytes(body:getBytes(0, body:length()) .. '{name}' .. count)
end"
            )
        };
        let filters = [
            filter("one", "stat_prefix: one", &script("a")),
            filter("two", "stat_prefix: two", &script("b")),
        ]
        .concat();
        let origin = Origin::new(&[OK, CHUNKED]).await;
        let mesh = Mesh::new(TO_A, "", &filters, &[("a", origin.port)]).await;
        let answer = mesh.ask(POST).await;
        assert!(
            origin.seen()[0].ends_with("\r\n\r\nhelloa1b1"),
            "{}",
            origin.seen()[0]
        );
        assert!(answer.ends_with("\r\n\r\nokb1a1"), "{answer}");
        let answer = mesh.ask(POST).await;
        assert!(
            origin.seen()[1].ends_with("\r\n\r\nhelloa2b2"),
            "{}",
            origin.seen()[1]
        );
        assert!(answer.ends_with("\r\n\r\nabcdeb2a2"), "{answer}");
        for name in ["one", "two"] {
            assert_eq!(number(&mesh, &format!("{name}.executions")), 4);
            assert_eq!(number(&mesh, &format!("{name}.errors")), 0);
        }
    });
}

#[test]
fn one_script_holds_many_streams_at_once() {
    run(async {
        let script = "function envoy_on_request(handle)
  local id = handle:headers():get('x-id')
  local body = handle:body()
  handle:headers():add('x-same', tostring(id == handle:headers():get('x-id')) .. body:getBytes(0, 1) .. id)
end";
        let origin = Origin::new(&[OK; 20]).await;
        let mesh = mesh(script, &origin).await;
        let mut streams = Vec::new();
        for id in 0..10 {
            let mut stream = mesh.connect().await;
            let head = format!(
                "POST / HTTP/1.1\r\nHost: h\r\nX-Id: {id}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{id}"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            streams.push(stream);
        }
        for stream in streams.iter_mut().rev() {
            stream.write_all(b"x").await.unwrap();
            let mut answer = String::new();
            within(stream.read_to_string(&mut answer)).await.unwrap();
            assert!(answer.ends_with("ok"), "{answer}");
        }
        for seen in origin.seen() {
            let same = seen
                .lines()
                .find_map(|line| line.strip_prefix("x-same: true"));
            let same = same.unwrap().as_bytes();
            assert_eq!(same[0], same[1], "{seen}");
        }
    });
}

#[test]
fn what_a_run_holds_goes_with_it() {
    run(async {
        // Twice of what a state may hold, were it kept: by those that end and by those that wait when the client leaves.
        let script = "function envoy_on_request(handle)
  local held = string.rep('x', 32768) .. handle:headers():get('x-id')
  handle:body()
  if #held > 40000 then handle:logErr('never') end
end";
        let origin = Origin::new(&[OK; 1100]).await;
        let mesh = mesh(script, &origin).await;
        let mut stream = mesh.connect().await;
        let mut bytes = Vec::new();
        for id in 0..1100 {
            let request =
                format!("POST / HTTP/1.1\r\nHost: h\r\nX-Id: {id}\r\nContent-Length: 1\r\n\r\nx");
            stream.write_all(request.as_bytes()).await.unwrap();
            bytes.clear();
            while !bytes.ends_with(b"\r\n\r\nok") {
                assert!(within(stream.read_buf(&mut bytes)).await.unwrap() > 0);
            }
        }
        for id in 0..1100 {
            let mut stream = mesh.connect().await;
            let request =
                format!("POST / HTTP/1.1\r\nHost: h\r\nX-Id: {id}\r\nContent-Length: 1\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
        }
        mesh.log(2200).await;
        assert_eq!(number(&mesh, "executions"), 2200);
        assert_eq!(number(&mesh, "errors"), 0);
    });
}

#[test]
fn scripts_as_they_are_written_for_others_run_unchanged() {
    run(async {
        // A header with the route's metadata; a body that is compared; a response that is rebuilt; an authorization by a
        // call; a log line for each header.
        let scripts = [
            "function envoy_on_request(request_handle)
  local meta = request_handle:metadata():get('foo')
  request_handle:headers():add('x-foo', meta and meta.bar or 'none')
  request_handle:logInfo('Hello World.')
end
function envoy_on_response(response_handle)
  response_handle:headers():add('response-body-size', tostring(response_handle:body():length()))
end",
            "function envoy_on_request(request_handle)
  request_handle:logWarn('x: ' .. request_handle:headers():get(':path'))
  if request_handle:headers():get('x-blocked') ~= nil then
    request_handle:respond({[':status'] = '403'}, 'blocked')
  end
end",
            "function envoy_on_response(response_handle)
  local content_length = response_handle:body():setBytes('<html><b>Not Found</b></html>')
  response_handle:headers():replace('content-length', content_length)
  response_handle:headers():replace('content-type', 'text/html')
end",
            "function envoy_on_request(request_handle)
  local headers, body = request_handle:httpCall(
    'b',
    {
      [':method'] = 'POST',
      [':path'] = '/acl',
      [':authority'] = 'internal.org.net'
    },
    'authorize call',
    5000)
  if headers[':status'] ~= '200' then
    request_handle:respond({[':status'] = headers[':status']}, body)
  end
end",
            "function version_of(handle)
  local v = handle:headers():get('user-agent')
  return v and v:match('%d+') or '0'
end
function envoy_on_request(request_handle)
  for key, value in pairs(request_handle:headers()) do
    request_handle:logTrace(key .. ': ' .. value)
  end
  request_handle:headers():add('x-version', version_of(request_handle))
end
function envoy_on_response(response_handle)
  if response_handle:headers():get(':status') == '200' then
    response_handle:headers():add('x-frame-options', 'deny')
  end
end",
        ];
        let filters: String = scripts
            .iter()
            .enumerate()
            .map(|(index, script)| filter(&format!("f{index}"), "", script))
            .collect();
        let a = Origin::new(&[OK]).await;
        let b = Origin::new(&[OK]).await;
        let mesh = Mesh::new(TO_A, "", &filters, &[("a", a.port), ("b", b.port)]).await;
        let answer = mesh
            .ask("GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: curl/8\r\nConnection: close\r\n\r\n")
            .await;
        let seen = &a.seen()[0];
        assert!(
            seen.contains("x-foo: none\r\n") && seen.contains("x-version: 8\r\n"),
            "{seen}"
        );
        assert!(b.seen()[0].ends_with("\r\n\r\nauthorize call"));
        for line in [
            "x-frame-options: deny",
            "content-type: text/html",
            "response-body-size: 29",
        ] {
            assert!(answer.contains(&format!("\r\n{line}\r\n")), "{answer}");
        }
        assert!(
            answer.ends_with("\r\n\r\n<html><b>Not Found</b></html>"),
            "{answer}"
        );
        assert_eq!(number(&mesh, "errors"), 0);
    });
}

#[test]
fn a_script_that_cannot_be_loaded_is_refused_with_its_line() {
    let listener = |further: &str, script: &str| {
        let filter = filter("lua", further, script);
        let yaml = format!(
            "name: l
address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: test
      route_config: {{virtual_hosts: []}}
      http_filters:
{filter}      - name: router
        typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"
        );
        let message = message::<proto::envoy::config::listener::v3::Listener>(&yaml);
        let refused = outrigger_proxy::plan::Listener::try_from(&message);
        refused.unwrap_err().to_string()
    };
    let at = "filter_chains[0].filters[0].typed_config.http_filters[0].typed_config";
    assert_eq!(
        listener("", "\nfunction f("),
        format!(
            "{at}.default_source_code: script load error: default_source_code:3: <name> or '...' expected near '<eof>'"
        )
    );
    assert!(listener("", "error('x')").contains("default_source_code:1: x"));
    assert!(listener("", "while true do end").contains("an endless loop?"));
    assert!(listener("inline_code: a()", "a = 1").contains("only one of"));
}
