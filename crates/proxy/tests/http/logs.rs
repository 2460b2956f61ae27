//! What single operators of log lines tell of a request.

use std::path::PathBuf;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::spawn_local,
};

use crate::support::{Act, Mesh, OK, Origin, TO_A, request, run, within};

/// A further access log of a format, in a file of its own.
struct Lines {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Lines {
    /// The log and its configuration.
    fn of(format: &str) -> (Lines, String) {
        Lines::with(format, "")
    }

    /// [`Lines::of`] with further fields of the format.
    fn with(format: &str, fields: &str) -> (Lines, String) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lines");
        let log = format!(
            "{{name: own, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
             path: {}, log_format: {{text_format_source: {{inline_string: '{format}\n\n'}}{fields}}}}}}}",
            path.display()
        );
        let lines = Lines {
            path,
            _folder: folder,
        };
        (lines, log)
    }

    /// What was written, once there are so many lines.
    async fn read(&self, count: usize) -> Vec<String> {
        within(async {
            loop {
                let text = std::fs::read_to_string(&self.path).unwrap_or_default();
                if text.matches('\n').count() >= count {
                    return text.lines().map(str::to_owned).collect();
                }
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        })
        .await
    }
}

#[test]
fn the_first_bytes_of_a_body_have_a_time_of_their_own() {
    run(async {
        // The first has its body behind a head that the client has seen, the second none.
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let (seen, head_seen) = tokio::sync::oneshot::channel::<()>();
        spawn_local(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            request(&mut stream).await.expect("a request");
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n";
            stream.write_all(head).await.expect("it is there");
            head_seen.await.expect("the client sees it");
            stream
                .write_all(&vec![b'x'; 200_000])
                .await
                .expect("it is there");
            request(&mut stream).await.expect("another request");
            let head = b"HTTP/1.1 204 No Content\r\n\r\n";
            stream.write_all(head).await.expect("it is there");
            std::future::pending::<()>().await;
        });
        let (lines, log) = Lines::of(
            "%COMMON_DURATION(US_RX_BEG:US_RX_BODY_BEG:ns)% %COMMON_DURATION(DS_TX_BEG:US_RX_BODY_BEG:ns)% \
             %COMMON_DURATION(US_RX_BODY_BEG:DS_RX_BEG:ns)%",
        );
        let mesh = Mesh::with_log(TO_A, "", &log, &[("a", port)]).await;
        let mut client = mesh.connect().await;
        let get = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        client.write_all(get).await.expect("it is there");
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            within(client.read_buf(&mut answer)).await.expect("a head");
        }
        seen.send(()).expect("the origin waits");
        let mut body = vec![0; 200_000];
        within(client.read_exact(&mut body)).await.expect("a body");
        assert!(mesh.get("/none").await.starts_with("HTTP/1.1 204 "));
        let lines = lines.read(2).await;
        let words: Vec<_> = lines[0].split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().expect("nanoseconds");
        assert!(number(0) > 0 && number(1) > 0, "{lines:?}");
        assert_eq!(words[2], "-", "backwards there is no duration");
        assert_eq!(lines[1], "- - -");
    });
}

#[test]
fn routes_that_are_looked_for_are_counted_and_timed() {
    run(async {
        let origin = Origin::new(&[OK; 2]).await;
        let format = "%ROUTE_RESOLUTION_COUNT% %ROUTE_RESOLUTION_TIME_US% %RESPONSE_CODE%";
        let (lines, log) = Lines::of(format);
        let routes = "          - {match: {prefix: /moved}, route: {cluster: a, internal_redirect_policy: {}}}
          - {match: {prefix: /}, route: {cluster: a}}";
        let moved =
            Act::Say("HTTP/1.1 302 Found\r\nLocation: http://h/\r\nContent-Length: 0\r\n\r\n");
        let mover = Origin::new(&[OK, moved, OK]).await;
        let options = "record_route_resolution_stats: true";
        let mesh = Mesh::with_log(routes, options, &log, &[("a", mover.port)]).await;
        mesh.get("/").await;
        assert!(mesh.get("/moved").await.ends_with("ok"));
        let hostless = "GET / HTTP/1.1\r\nConnection: close\r\n\r\n";
        assert!(mesh.ask(hostless).await.starts_with("HTTP/1.1 400 "));
        let lines = lines.read(3).await;
        let counts: Vec<_> = lines
            .iter()
            .map(|line| {
                let words: Vec<_> = line.split(' ').collect();
                words[1].parse::<u64>().expect("microseconds");
                format!("{} {}", words[0], words[2])
            })
            .collect();
        assert_eq!(counts, ["1 200", "2 200", "0 400"]);
        assert!(lines[2].starts_with("0 0 "), "{lines:?}");
        mesh.server.publish();
        let text = mesh.server.store.text(&Default::default());
        for name in [
            "downstream_rq_route_resolutions",
            "downstream_rq_route_resolution_time_us",
        ] {
            assert!(
                text.contains(&format!("http.test.{name}: P0")),
                "{name}: {text}"
            );
        }
        // Without the option there are no histograms.
        let mesh = Mesh::with_log(TO_A, "", &log, &[("a", origin.port)]).await;
        mesh.get("/").await;
        mesh.server.publish();
        let text = mesh.server.store.text(&Default::default());
        assert!(!text.contains("route_resolution"), "{text}");
    });
}

#[test]
fn a_line_tells_how_the_client_went_away() {
    run(async {
        let origin = Origin::new(&[Act::Hang, Act::Hang, OK]).await;
        let (lines, log) = Lines::of(
            "%DOWNSTREAM_DETECTED_CLOSE_TYPE% %UPSTREAM_DETECTED_CLOSE_TYPE% %RESPONSE_FLAGS%",
        );
        let mesh = Mesh::with_log(TO_A, "", &log, &[("a", origin.port)]).await;
        for (count, reset) in [(1, false), (2, true)] {
            let mut client = mesh.connect().await;
            let get = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
            client.write_all(get).await.expect("it is there");
            within(async {
                while origin.seen().len() < count {
                    tokio::task::yield_now().await;
                }
            })
            .await;
            if reset {
                let socket = socket2::SockRef::from(&client);
                let now = Some(std::time::Duration::ZERO);
                socket.set_linger(now).expect("it is open");
            }
            drop(client);
            lines.read(count).await;
        }
        assert!(mesh.get("/").await.ends_with("ok"));
        let lines = lines.read(3).await;
        // The connection of the last is open when its line is written.
        assert_eq!(lines, ["Normal - DC", "RemoteReset - DC", "Normal - -"]);
    });
}

#[test]
fn details_may_be_asked_for_with_their_white_space() {
    run(async {
        let (lines, log) =
            Lines::of("%RESPONSE_CODE_DETAILS% %RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)%");
        let mesh = Mesh::with_log(TO_A, "", &log, &[]).await;
        assert!(mesh.get("/").await.starts_with("HTTP/1.1 503 "));
        assert_eq!(lines.read(1).await, ["cluster_not_found cluster_not_found"]);
    });
}

const FILES: &str = ", formatters: [{name: envoy.formatter.file_content, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.formatter.file_content.v3.FileContent}}]";

#[test]
fn the_content_of_a_file_stands_in_lines_and_follows_the_file() {
    run(async {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("build");
        std::fs::write(&file, "one two").expect("it can be written");
        let (lines, log) = Lines::with(
            &format!(
                "%FILE_CONTENT({path})% %FILE_CONTENT({path}:{folder}):3% %RESPONSE_CODE%",
                path = file.display(),
                folder = folder.path().display()
            ),
            FILES,
        );
        let routes = "          - {match: {prefix: /}, direct_response: {status: 200}}";
        let mesh = Mesh::with_log(routes, "", &log, &[]).await;
        mesh.get("/").await;
        assert_eq!(lines.read(1).await, ["one two one 200"]);
        // Another file takes its place, as a mounted one is changed.
        let next = folder.path().join("next");
        std::fs::write(&next, "three").expect("it can be written");
        std::fs::rename(&next, &file).expect("it is there");
        let mut count = 1;
        within(async {
            loop {
                mesh.get("/").await;
                count += 1;
                let last = lines.read(count).await.pop();
                if last.as_deref() == Some("three thr 200") {
                    return;
                }
                assert_eq!(last.as_deref(), Some("one two one 200"));
            }
        })
        .await;
        // What cannot be read, or is too long, lets no listener through.
        let long = folder.path().join("long");
        std::fs::write(&long, vec![b'x'; 70_000]).expect("it can be written");
        for (path, why) in [
            ("/nowhere", "cannot read /nowhere"),
            (&*long.display().to_string(), "more than 64 KiB"),
        ] {
            let (_, log) = Lines::with(&format!("%FILE_CONTENT({path})%"), FILES);
            let refused = mesh.refused(&log);
            assert!(refused.contains(why), "{refused}");
        }
    });
}

#[test]
fn a_secret_stands_in_lines_once_it_has_come() {
    run(async {
        use outrigger_proxy::{
            plan::{
                bootstrap::{ConfigSource, ConfigSourceKind},
                tls::{DataSource, SdsSecret, Secret, SecretKind},
            },
            server::Change,
        };
        let formatter = ", formatters: [{name: envoy.formatter.generic_secret, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.formatter.generic_secret.v3.GenericSecret, \
            secret_configs: {token: {name: bearer, sds_config: {ads: {}}}, own: {name: static}}}}]";
        let routes = "          - {match: {prefix: /}, direct_response: {status: 200}}";
        let (lines, log) = Lines::with("%SECRET(token):5% %SECRET(token)%", formatter);
        let mesh = Mesh::with_log(routes, "", &log, &[]).await;
        mesh.get("/").await;
        assert_eq!(lines.read(1).await, ["- -"]);
        let name = SdsSecret {
            name: "bearer".into(),
            source: Some(ConfigSource {
                kind: ConfigSourceKind::Ads,
                initial_fetch_timeout: Some(std::time::Duration::from_secs(15)),
            }),
        };
        let mut count = 1;
        for (text, line) in [("swordfish", "sword swordfish"), ("", "- -")] {
            let secret = Secret {
                name: "bearer".into(),
                kind: SecretKind::Generic(DataSource::Inline(text.into())),
            };
            let change = Change::Secret(name.clone(), std::sync::Arc::new(secret));
            for result in mesh.server.apply(vec![change]) {
                result.expect("it is a text");
            }
            mesh.get("/").await;
            count += 1;
            assert_eq!(lines.read(count).await[count - 1], line);
        }
        let (_, log) = Lines::with("%SECRET(own)%", formatter);
        let refused = mesh.refused(&log);
        assert!(
            refused.contains("`static` is no generic secret of the bootstrap"),
            "{refused}"
        );
    });
}

#[test]
fn files_and_secrets_are_printed_only_where_a_formatter_allows_it() {
    for (format, formatters, why) in [
        (
            "%FILE_CONTENT(/etc/hostname)%",
            "",
            "needs the formatter envoy.formatter.file_content",
        ),
        ("%FILE_CONTENT%", FILES, "needs PATH"),
        ("%FILE_CONTENT(a:b:c)%", FILES, "needs PATH"),
        ("%SECRET(a)%", FILES, "`a` is none of the secret_configs"),
    ] {
        let (_, log) = Lines::with(format, formatters);
        let error = Mesh::plan(&log).expect_err(format);
        assert!(error.contains(why), "{format}: {error}");
    } // A route's replies are none of a listener's.
    let yaml = format!(
        "name: r\nvirtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200, \
         body_format: {{text_format_source: {{inline_string: x}}{FILES}}}}}}}]}}]"
    );
    let message =
        testkit::envoy::message::<proto::envoy::config::route::v3::RouteConfiguration>(&yaml);
    let error = outrigger_proxy::plan::RouteConfiguration::try_from(&message);
    let error = error.expect_err("nobody follows the file").to_string();
    assert!(
        error.contains("listeners' logs and replies alone"),
        "{error}"
    );
}

#[test]
fn members_of_json_are_what_envoy_writes_where_there_is_nothing_to_tell() {
    run(async {
        let origin = Origin::new(&[OK, Act::Hang]).await;
        let folder = tempfile::tempdir().expect("a folder");
        let lines = Lines {
            path: folder.path().join("lines"),
            _folder: folder,
        };
        let log = format!(
            "{{name: own, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
             path: {}, log_format: {{json_format: {{flags: '%RESPONSE_FLAGS%', long: '%RESPONSE_FLAGS_LONG%', \
             status: '%RESP(:STATUS)%', sent: '%UPSTREAM_WIRE_BYTES_SENT%', \
             request: '%REQUEST_HEADERS_BYTES%', response: '%RESPONSE_HEADERS_BYTES%', \
             why: '%UPSTREAM_TRANSPORT_FAILURE_REASON%'}}}}}}}}",
            lines.path.display()
        );
        let routes = "          - {match: {prefix: /dead}, route: {cluster: dead}}\n          - {match: {prefix: /none}, route: {cluster: none}}\n          - {match: {prefix: /}, route: {cluster: a}}";
        let dead = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = dead.local_addr().expect("it is bound").port();
        drop(dead);
        let clusters = [("a", origin.port), ("dead", port)];
        let mesh = Mesh::with_log(routes, "generate_request_id: false", &log, &clusters).await;
        mesh.get("/").await;
        mesh.get("/dead").await;
        mesh.get("/none").await;
        let mut client = mesh.connect().await;
        let get = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        client.write_all(get).await.expect("it is there");
        within(async {
            while origin.seen().len() < 2 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        drop(client);
        let lines = lines.read(4).await;
        let member = |line: usize, name: &str| {
            let line: serde_json::Value = serde_json::from_str(&lines[line]).expect("JSON");
            line[name].clone()
        };
        assert_eq!(member(0, "flags"), "-");
        assert_eq!(member(0, "long"), "-");
        assert_eq!(member(0, "status"), "200");
        assert_eq!(member(1, "flags"), "UF");
        assert_eq!(
            member(1, "why"),
            "delayed_connect_error:_Connection_refused"
        );
        assert_eq!(member(2, "sent"), 0);
        // Nobody was answered.
        assert_eq!(member(3, "status"), serde_json::Value::Null);
        assert_eq!(member(3, "response"), 0);
        // Names and values alone, those of pseudo-headers too.
        let seen = &origin.seen()[1];
        let fields: usize = seen
            .lines()
            .skip(1)
            .filter(|line| !line.to_ascii_lowercase().starts_with("host:"))
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| name.len() + value.len())
            .sum();
        let pseudo =
            ":method".len() + 3 + ":path".len() + 1 + ":authority".len() + 1 + ":scheme".len() + 4;
        assert_eq!(member(3, "request"), fields + pseudo, "{seen}");
    });
}
