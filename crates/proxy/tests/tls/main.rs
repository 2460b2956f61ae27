//! TLS as peers see it: handshakes that work, handshakes that must not, secrets that change.

mod changes;
mod decisions;
mod envoy;
mod sds;
mod support;

use base::clock::Clock;
use support::*;
use tokio::task::LocalSet;

const CLIENT: &str = "spiffe://cluster.local/ns/a/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/b/sa/server";

macro_rules! live {
    ($(async fn $name:ident() $body:block)*) => {$(
        #[test]
        fn $name() {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            LocalSet::new().block_on(&runtime, async $body);
        }
    )*};
}

/// A context that presents a certificate and wants one of an authority, with these conditions on names.
fn mutual(leaf: &Leaf, trust: &Authority, names: &[&str]) -> String {
    let names: Vec<_> = names
        .iter()
        .map(|name| format!("{{san_type: URI, matcher: {{exact: '{name}'}}}}"))
        .collect();
    format!(
        "{}, validation_context: {{trusted_ca: {}, match_typed_subject_alt_names: [{}]}}",
        certificate(leaf),
        inline(&trust.pem()),
        names.join(", ")
    )
}

live! {
    async fn two_proxies_speak_mutual_tls() {
        let ca = Authority::new("root");
        let back = proxy(vec![
            cluster("app", origin().await, ""),
            listener("in", &format!("- {{{}, {}}}",
                http_to("app", ""),
                downstream(&format!("alpn_protocols: ['h2,http/1.1'], {}", mutual(&ca.issue(&[SERVER]), &ca, &[CLIENT])), ", require_client_certificate: true")), ""),
        ]).await;
        let port = address(&back, "in").port();
        let common = mutual(&ca.issue(&[CLIENT]), &ca, &[SERVER]);
        let front = proxy(vec![
            cluster("h1", port, &upstream(&format!("{common}, alpn_protocols: [http/1.1]"), ", sni: outbound_.80_._.b.default.svc.cluster.local")),
            cluster("h2", port, &format!("{}\ntyped_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {{http2_protocol_options: {{}}}}}}}}",
                upstream(&format!("{common}, alpn_protocols: [h2]"), ""))),
            listener("out1", &format!("- {{{}}}", http_to("h1", "")), ""),
            listener("out2", &format!("- {{{}}}", http_to("h2", "")), ""),
        ]).await;
        for listener in ["out1", "out2"] {
            let answer = get(address(&front, listener), "").await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        stat(&back, "listener.in.ssl.handshake", 2).await;
        stat(&back, "listener.in.ssl.versions.TLSv1.3", 2).await;
        stat(&back, "listener.in.ssl.ciphers.TLS_AES_128_GCM_SHA256", 2).await;
        stat(&back, "listener.in.ssl.curves.X25519", 2).await;
        stat(&back, "listener.in.ssl.no_certificate", 0).await;
        stat(&front, "cluster.h1.ssl.handshake", 1).await;
        stat(&front, "cluster.h2.ssl.handshake", 1).await;
        stat(&front, "cluster.h2.upstream_cx_http2_total", 1).await;
        back.publish();
        stat(&back, "server.total_connections", 2).await;
        let days = back.store.number("server.days_until_first_cert_expiring");
        assert!(days < i64::from(u32::MAX), "{days}");
    }
}

live! {
    async fn a_check_speaks_the_protocol_that_alpn_has_agreed_on() {
        let ca = Authority::new("root");
        for (offered, spoken) in [("[h2, http/1.1]", "2"), ("[http/1.1]", "1"), ("[]", "1")] {
            let own = format!("alpn_protocols: {offered}, {}", mutual(&ca.issue(&[SERVER]), &ca, &[CLIENT]));
            let back = proxy(vec![
                cluster("app", origin().await, ""),
                listener("in", &format!("- {{{}, {}}}", http_to("app", ""), downstream(&own, "")), ""),
            ]).await;
            let check = "health_checks: [{timeout: 5s, interval: 0.010s, no_traffic_interval: 0.010s, unhealthy_threshold: 1, healthy_threshold: 1, \
                http_health_check: {path: /, use_alpn_protocol: true}}]";
            let own = mutual(&ca.issue(&[CLIENT]), &ca, &[SERVER]);
            let port = address(&back, "in").port();
            let front = proxy(vec![cluster("a", port, &format!("{}\n{check}", upstream(&own, "")))]).await;
            stat(&front, "cluster.a.health_check.healthy", 1).await;
            assert_eq!(front.store.number("cluster.a.health_check.failure"), 0);
            let count = |version: &str| back.store.number(&format!("http.app.downstream_cx_http{version}_total"));
            assert_eq!(count(spoken), 1, "{offered}");
            assert_eq!(count("1") + count("2"), 1, "one connection serves all checks");
        }
    }
}

/// An access log of a connection manager, as JSON with these members.
fn log_of(path: &std::path::Path, members: &str) -> String {
    format!(
        "access_log: [{{name: f, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
         path: {path:?}, log_format: {{json_format: {{{members}}}}}}}}}],"
    )
}

live! {
    async fn what_tls_agreed_on_stands_in_logs() {
        let ca = Authority::new("root");
        let dir = tempfile::tempdir().expect("a directory");
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        let (server, client) = (ca.issue(&[SERVER, "server.test"]), ca.issue(&[CLIENT, "client.test"]));
        let fingerprint = sha256(&client);
        let issuer = read(&ca.pem());
        let log = log_of(&inside, "version: \"%DOWNSTREAM_TLS_VERSION%\", cipher: \"%DOWNSTREAM_TLS_CIPHER%\", group: \"%DOWNSTREAM_TLS_GROUP%\", \
            sni: \"%REQUESTED_SERVER_NAME%\", host: \"%REQUESTED_SERVER_NAME(HOST_FIRST:HOST)%\", uri: \"%DOWNSTREAM_PEER_URI_SAN%\", dns: \"%DOWNSTREAM_PEER_DNS_SAN%\", \
            own: \"%DOWNSTREAM_LOCAL_URI_SAN%\", issuer: \"%DOWNSTREAM_PEER_ISSUER%\", subject: \"%DOWNSTREAM_PEER_SUBJECT%\", hash: \"%DOWNSTREAM_PEER_FINGERPRINT_256%\", \
            hashes: \"%DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_256%\", mail: \"%DOWNSTREAM_PEER_EMAIL_SAN%\", until: \"%DOWNSTREAM_PEER_CERT_V_END(%s)%\", ja3: \"%TLS_JA3_FINGERPRINT%\", \
            vouched: \"%DOWNSTREAM_PEER_ISSUER_FINGERPRINT_256%\", serial: \"%DOWNSTREAM_PEER_ISSUER_SERIAL%\"");
        let back = proxy(vec![
            cluster("app", origin().await, ""),
            listener("in", &format!("- {{{}, {}}}",
                http_to("app", &log),
                downstream(&mutual(&server, &ca, &[CLIENT]), ", require_client_certificate: true")), INSPECTOR),
        ]).await;
        let port = address(&back, "in").port();
        let log = log_of(&outside, "version: \"%UPSTREAM_TLS_VERSION%\", group: \"%UPSTREAM_TLS_GROUP%\", name: \"%UPSTREAM_SERVER_NAME%\", \
            uri: \"%UPSTREAM_PEER_URI_SAN%\", own: \"%UPSTREAM_LOCAL_DNS_SAN%\", shaken: \"%COMMON_DURATION(US_CX_END:US_HS_END:ns)%\", \
            id: \"%UPSTREAM_CONNECTION_ID%\", ids: \"%UPSTREAM_CONNECTION_IDS_ATTEMPTED%\", none: \"%DOWNSTREAM_TLS_VERSION%\"");
        let front = proxy(vec![
            cluster("a", port, &upstream(&mutual(&client, &ca, &[SERVER]), ", sni: in.test")),
            listener("out", &format!("- {{{}}}", http_to("a", &log)), ""),
        ]).await;
        let answer = get(address(&front, "out"), "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        for server in [&front, &back] {
            server.shut_down();
        }
        let line = |path| -> serde_json::Value {
            let text = std::fs::read_to_string(path).expect("it was written");
            serde_json::from_str(text.lines().next().expect("one line")).expect("JSON")
        };
        let day = std::time::SystemTime::now() + std::time::Duration::from_secs(24 * 3600);
        let day = day.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
        let seen = line(&inside);
        for (member, value) in [
            ("version", "TLSv1.3"),
            ("cipher", "TLS_AES_128_GCM_SHA256"),
            ("group", "X25519"),
            ("sni", "in.test"),
            ("host", "h"),
            ("uri", CLIENT),
            ("dns", "client.test"),
            ("own", SERVER),
            ("issuer", "CN=root"),
            ("hash", &fingerprint),
            ("hashes", &fingerprint),
            ("vouched", &issuer.fingerprint()),
            ("serial", &issuer.serial),
        ] {
            assert_eq!(seen[member], value, "{member}: {seen}");
        }
        assert_eq!(seen["subject"], format!("CN={CLIENT}"));
        let until: u64 = seen["until"].as_str().and_then(|until| until.parse().ok()).expect("a number");
        assert!(until.abs_diff(day) < 3600, "{seen}");
        for member in ["mail", "ja3"] {
            assert!(seen[member].is_null(), "{member}: {seen}");
        }
        let seen = line(&outside);
        for (member, value) in [
            ("version", "TLSv1.3"),
            ("group", "X25519"),
            ("name", "in.test"),
            ("uri", SERVER),
            ("own", "client.test"),
        ] {
            assert_eq!(seen[member], value, "{member}: {seen}");
        }
        assert!(seen["shaken"].as_u64().is_some_and(|took| took > 0), "{seen}");
        assert_eq!(seen["id"].to_string(), seen["ids"].as_str().expect("a text"));
        assert!(seen["none"].is_null(), "{seen}");
    }
}

/// A listener with mutual TLS before an origin.
async fn mutual_server(
    ca: &Authority,
    leaf: &Leaf,
    hcm: &str,
) -> std::rc::Rc<outrigger_proxy::server::Server> {
    let context = format!(
        "alpn_protocols: [h2, http/1.1], {}",
        mutual(leaf, ca, &[CLIENT])
    );
    proxy(vec![
        cluster("app", origin().await, ""),
        listener(
            "in",
            &format!(
                "- {{{}, {}}}",
                http_to("app", hcm),
                downstream(&context, ", require_client_certificate: true")
            ),
            "",
        ),
    ])
    .await
}

live! {
    async fn clients_that_must_not_come_in_are_told_apart() {
        let (ca, other) = (Authority::new("root"), Authority::new("other"));
        let server = mutual_server(&ca, &ca.issue(&[SERVER, "h"]), "").await;
        let at = address(&server, "in");
        let good = ca.issue(&[CLIENT]);
        let mut stream = handshake(&client(&ca, Some(&good), &["http/1.1"]), at, "h").await.expect("it is let in");
        let answer = exchange(&mut stream, "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

        let refused = [
            (None, "fail_verify_no_cert", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
            (Some(other.issue(&[CLIENT])), "fail_verify_error", "not signed by a trusted authority"),
            (Some(ca.issue(&["spiffe://cluster.local/ns/a/sa/else"])), "fail_verify_san", "spiffe://cluster.local/ns/a/sa/else"),
            (Some(ca.issue_until(&[CLIENT], -1)), "fail_verify_error", "has expired"),
        ];
        let mut counts = std::collections::BTreeMap::new();
        for (leaf, count, reason) in refused {
            let before = server.store.number(&format!("listener.in.ssl.{count}"));
            // With TLS 1.3 a client learns of it with its first read.
            if let Ok(mut stream) = handshake(&client(&ca, leaf.as_ref(), &[]), at, "h").await {
                assert_eq!(exchange(&mut stream, "").await, "", "{count}");
            }
            stat(&server, &format!("listener.in.ssl.{count}"), before + 1).await;
            *counts.entry(count).or_insert(0) += 1;
            said(&server, reason).await;
        }
        // Plaintext where TLS is spoken.
        get(at, "").await;
        stat(&server, "listener.in.ssl.connection_error", 1).await;
        said(&server, "does not speak TLS").await;
        stat(&server, "listener.in.ssl.handshake", 1).await;
    }

    async fn servers_that_are_not_who_they_should_be_get_no_request() {
        let (ca, other) = (Authority::new("root"), Authority::new("other"));
        let own = mutual(&ca.issue(&[CLIENT]), &ca, &[SERVER]);
        let plain = origin().await;
        let cases = [
            ("ca", other.issue(&[SERVER]), "fail_verify_error", "not signed by a trusted authority"),
            ("san", ca.issue(&["spiffe://cluster.local/ns/b/sa/else"]), "fail_verify_san", "verify SAN list"),
            ("old", ca.issue_until(&[SERVER], -1), "fail_verify_error", "has expired"),
        ];
        let mut listeners = Vec::new();
        let clear = proxy(vec![
            cluster("app", plain, ""),
            listener("in", &format!("- {{{}}}", http_to("app", "")), ""),
        ]).await;
        let mut clusters = vec![cluster("plain", address(&clear, "in").port(), &upstream(&own, ""))];
        for (name, leaf, ..) in &cases {
            let context = downstream(&certificate(leaf), "");
            let server = proxy(vec![
                cluster("app", plain, ""),
                listener("in", &format!("- {{{}, {context}}}", http_to("app", "")), ""),
            ]).await;
            clusters.push(cluster(name, address(&server, "in").port(), &upstream(&own, "")));
            listeners.push(server);
        }
        for name in ["plain", "ca", "san", "old"] {
            clusters.push(listener(name, &format!("- {{{}}}", http_to(name, "")), ""));
        }
        let front = proxy(clusters).await;
        for (name, _, count, reason) in &cases {
            let answer = get(address(&front, name), "").await;
            assert!(answer.starts_with("HTTP/1.1 503"), "{name}: {answer}");
            assert!(answer.contains("TLS_error") && answer.contains(reason), "{name}: {answer}");
            stat(&front, &format!("cluster.{name}.ssl.{count}"), 1).await;
            stat(&front, &format!("cluster.{name}.ssl.handshake"), 0).await;
        }
        let answer = get(address(&front, "plain"), "").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("does not speak TLS"), "{answer}");
        stat(&front, "cluster.plain.ssl.connection_error", 1).await;
    }

    async fn a_client_certificate_is_told_to_the_origin_and_to_nobody_elses_profit() {
        let ca = Authority::new("root");
        let forged = "x-forwarded-client-cert: By=x;URI=spiffe://cluster.local/ns/x/sa/forged\r\n";
        let hcm = "forward_client_cert_details: SANITIZE_SET, set_current_client_cert_details: {subject: true, uri: true, dns: true},";
        let server = mutual_server(&ca, &ca.issue(&[SERVER, "h"]), hcm).await;
        let leaf = ca.issue(&[CLIENT, "a.example"]);
        let config = client(&ca, Some(&leaf), &["http/1.1"]);
        let mut stream = handshake(&config, address(&server, "in"), "h").await.expect("it is let in");
        let answer = exchange(&mut stream, forged).await;
        let hash = sha256(&leaf);
        let subject = format!("CN={CLIENT}");
        let want = format!("x-forwarded-client-cert: By={SERVER};Hash={hash};Subject=\"{subject}\";URI={CLIENT};DNS=a.example\r\n");
        assert!(answer.contains(&want), "{answer}");
        assert!(answer.contains("x-forwarded-proto: https"), "{answer}");

        let hcm = "forward_client_cert_details: APPEND_FORWARD,";
        let server = mutual_server(&ca, &ca.issue(&[SERVER, "h"]), hcm).await;
        let mut stream = handshake(&config, address(&server, "in"), "h").await.expect("it is let in");
        let answer = exchange(&mut stream, "x-forwarded-client-cert: By=x\r\n").await;
        assert!(answer.contains(&format!("x-forwarded-client-cert: By=x,By={SERVER};Hash={hash}\r\n")), "{answer}");

        let server = mutual_server(&ca, &ca.issue(&[SERVER, "h"]), "").await;
        let mut stream = handshake(&config, address(&server, "in"), "h").await.expect("it is let in");
        let answer = exchange(&mut stream, forged).await;
        assert!(!answer.contains("x-forwarded-client-cert"), "{answer}");
    }

    async fn requests_choose_what_is_told_of_the_client() {
        let ca = Authority::new("root");
        let input = "input: {name: i, typed_config: {\"@type\": type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput, header_name: x-what}}";
        let action = |config: &str| format!("{{action: {{name: a, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.ForwardClientCertConfig, {config}}}}}}}");
        let hcm = format!(
            "forward_client_cert_details: SANITIZE_SET, set_current_client_cert_details: {{uri: true}}, \
             forward_client_cert_matcher: {{matcher_tree: {{{input}, exact_match_map: {{map: {{\
             issuer: {}, nothing: {}, append: {}}}}}}}}},",
            action("forward_client_cert_details: SANITIZE_SET, set_current_client_cert_details: {issuer: true, dns: true}"),
            action("forward_client_cert_details: SANITIZE"),
            action("forward_client_cert_details: APPEND_FORWARD"),
        );
        let server = mutual_server(&ca, &ca.issue(&[SERVER, "h"]), &hcm).await;
        let leaf = ca.issue(&[CLIENT, "a.example"]);
        let hash = sha256(&leaf);
        let config = client(&ca, Some(&leaf), &["http/1.1"]);
        for (what, want) in [
            ("issuer", Some(format!("By={SERVER};Hash={hash};DNS=a.example;Issuer=\"CN=root\""))),
            ("other", Some(format!("By={SERVER};Hash={hash};URI={CLIENT}"))),
            ("nothing", None),
            ("append", Some(format!("By=x,By={SERVER};Hash={hash}"))),
            ("other", Some(format!("By={SERVER};Hash={hash};URI={CLIENT}"))),
        ] {
            let mut stream = handshake(&config, address(&server, "in"), "h").await.expect("it is let in");
            let answer = exchange(&mut stream, &format!("x-forwarded-client-cert: By=x\r\nx-what: {what}\r\n")).await;
            match want {
                Some(want) => assert!(answer.contains(&format!("x-forwarded-client-cert: {want}\r\n")), "{what}: {answer}"),
                None => assert!(!answer.contains("x-forwarded-client-cert"), "{what}: {answer}"),
            }
        }
    }

    async fn a_port_takes_both_and_strange_protocols_do_no_harm() {
        let ca = Authority::new("root");
        let leaf = ca.issue(&[SERVER, "h"]);
        let context = downstream(&format!("alpn_protocols: [h2, http/1.1], {}", certificate(&leaf)), "");
        let server = proxy(vec![
            cluster("app", origin().await, ""),
            listener("in", &format!(
                "- {{filter_chain_match: {{transport_protocol: tls}}, {}, {context}}}\n- {{filter_chain_match: {{transport_protocol: raw_buffer}}, {}}}",
                http_to("app", ""), http_to("app", "")), INSPECTOR),
        ]).await;
        let at = address(&server, "in");
        let answer = get(at, "").await;
        assert!(answer.contains("x-forwarded-proto: http\r\n"), "{answer}");
        // Nothing in common in ALPN: the handshake goes on without, as with BoringSSL.
        for alpn in [&["foo"][..], &["istio-http/1.1", "http/1.1"], &[]] {
            let mut stream = handshake(&client(&ca, None, alpn), at, "h").await.expect("it is let in");
            let answer = exchange(&mut stream, "").await;
            assert!(answer.contains("x-forwarded-proto: https\r\n"), "{alpn:?}: {answer}");
        }
        stat(&server, "listener.in.ssl.no_certificate", 3).await;
    }

    async fn new_certificates_are_for_new_handshakes() {
        let ca = Authority::new("root");
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let write = |leaf: &Leaf| {
            replace(&path("key.pem"), &leaf.key);
            replace(&path("cert.pem"), &leaf.chain);
        };
        write(&ca.issue(&["h", "first"]));
        let context = format!(
            "tls_certificates: [{{certificate_chain: {{filename: {}}}, private_key: {{filename: {}}}}}]",
            path("cert.pem").display(), path("key.pem").display());
        let server = proxy(vec![
            cluster("app", echo().await, ""),
            listener("in", &format!("- {{{}, {}}}", tcp_to("app"), downstream(&context, "")), ""),
        ]).await;
        let at = address(&server, "in");
        let config = client(&ca, None, &[]);
        let mut old = handshake(&config, at, "first").await.expect("it is the first certificate");
        write(&ca.issue(&["h", "second"]));
        stat(&server, "server.certificate_files.update_success", 1).await;
        handshake(&client(&ca, None, &[]), at, "second").await.expect("it is the second certificate");
        assert!(handshake(&client(&ca, None, &[]), at, "first").await.is_err());
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        old.write_all(b"still here").await.expect("it is open");
        let mut back = [0; 10];
        within(old.read_exact(&mut back)).await.expect("it is served");
        assert_eq!(&back, b"still here");
        // What cannot be used changes nothing.
        replace(&path("cert.pem"), "garbage");
        stat(&server, "server.certificate_files.update_failure", 1).await;
        handshake(&client(&ca, None, &[]), at, "second").await.expect("the second certificate stays");
    }

    async fn sessions_are_taken_up_again_on_both_sides() {
        let ca = Authority::new("root");
        let back = mutual_server(&ca, &ca.issue(&[SERVER, "h"]), "").await;
        let at = address(&back, "in");
        let config = client(&ca, Some(&ca.issue(&[CLIENT])), &["http/1.1"]);
        for resumed in [0, 1] {
            let mut stream = handshake(&config, at, "h").await.expect("it is let in");
            let answer = exchange(&mut stream, "").await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            stat(&back, "listener.in.ssl.session_reused", resumed).await;
        }
        let context = mutual(&ca.issue(&[CLIENT]), &ca, &[SERVER]);
        let one_each = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, common_http_protocol_options: {max_requests_per_connection: 1}, explicit_http_config: {http_protocol_options: {}}}}";
        let front = proxy(vec![
            cluster("b", at.port(), &format!("{}\n{one_each}", upstream(&context, ", sni: h"))),
            listener("out", &format!("- {{{}}}", http_to("b", "")), ""),
        ]).await;
        for _ in 0..3 {
            let answer = get(address(&front, "out"), "").await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        stat(&front, "cluster.b.ssl.handshake", 3).await;
        stat(&front, "cluster.b.ssl.session_reused", 2).await;
    }

    async fn requests_choose_the_name_that_is_asked_for_and_checked() {
        let ca = Authority::new("root");
        let chain = |name: &str, leaf: &Leaf| format!(
            "- {{filter_chain_match: {{transport_protocol: tls{name}}}, {}, {}}}\n", http_to("app", ""), downstream(&certificate(leaf), ""));
        let chains: String = ["a.example", "b.example"].iter()
            .map(|name| chain(&format!(", server_names: [{name}]"), &ca.issue(&[name])))
            .chain([chain("", &ca.issue(&["other.example"]))])
            .collect();
        let back = proxy(vec![cluster("app", origin().await, ""), listener("in", &chains, INSPECTOR)]).await;
        let trust = format!("validation_context: {{trusted_ca: {}}}", inline(&ca.pem()));
        let auto = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http_protocol_options: {}}, upstream_http_protocol_options: {auto_sni: true, auto_san_validation: true, override_auto_sni_header: X-Name}}}";
        let front = proxy(vec![
            cluster("b", address(&back, "in").port(), &format!("{}\n{auto}", upstream(&trust, ", sni: a.example"))),
            listener("out", &format!("- {{{}}}", http_to("b", "")), ""),
        ]).await;
        for (header, status) in [
            ("X-Name: a.example\r\n", "200"),
            ("X-Name: b.example\r\n", "200"),
            // The port does not count, and the connection is there already.
            ("X-Name: a.example:443\r\n", "200"),
            // Names and addresses that the certificate of the server is not for; the first is that of `Host`.
            ("", "503"),
            ("X-Name: 127.0.0.1\r\n", "503"),
            ("X-Name: 0.0.0.0\r\n", "503"),
        ] {
            let answer = get(address(&front, "out"), header).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{header}: {answer}");
        }
        stat(&front, "cluster.b.ssl.handshake", 2).await;
        stat(&front, "cluster.b.ssl.fail_verify_san", 2).await;
    }

    async fn sessions_end_with_the_certificates_that_they_began_with() {
        let ca = Authority::new("root");
        let now = std::time::SystemTime::now();
        let hour = std::time::Duration::from_secs(3600);
        let clock = Clock::manual(now);
        let server = |leaf: &Leaf| {
            let context = format!("alpn_protocols: [http/1.1], {}", mutual(leaf, &ca, &[CLIENT]));
            listener("in", &format!("- {{{}, {}}}", http_to("app", ""),
                downstream(&context, ", require_client_certificate: true")), "")
        };
        let back = proxy_with(clock.clone(), DRAIN, vec![
            cluster("app", origin().await, ""),
            server(&ca.issue_until(&[SERVER], 2)),
        ]).await;
        let port = address(&back, "in").port();
        let one_each = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, common_http_protocol_options: {max_requests_per_connection: 1}, explicit_http_config: {http_protocol_options: {}}}}";
        let client = |leaf: &Leaf, port: u16| cluster("b", port, &format!("{}\n{one_each}",
            upstream(&mutual(leaf, &ca, &[SERVER]), ", sni: h")));
        let front = proxy_with(clock.clone(), DRAIN, vec![
            client(&ca.issue_until(&[CLIENT], 4), port),
            listener("out", &format!("- {{{}}}", http_to("b", "")), ""),
        ]).await;
        let out = address(&front, "out");
        for resumed in [0, 1] {
            assert!(get(out, "").await.starts_with("HTTP/1.1 200"));
            stat(&front, "cluster.b.ssl.session_reused", resumed).await;
        }
        // The server's certificate has ended, and its sessions with it.
        clock.set(now + hour * 3);
        let answer = get(out, "").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("the certificate has expired"), "{answer}");
        // The server has a newer one: nothing of the old sessions is in the way.
        apply(&back, vec![server(&ca.issue(&[SERVER]))]).await;
        assert_eq!(address(&back, "in").port(), port);
        assert!(get(out, "").await.starts_with("HTTP/1.1 200"));
        assert!(get(out, "").await.starts_with("HTTP/1.1 200"));
        stat(&front, "cluster.b.ssl.session_reused", 2).await;
        // Our own has ended: the server says so, which it could not of a session that it takes up again.
        clock.set(now + hour * 5);
        assert!(get(out, "").await.starts_with("HTTP/1.1 503"));
        said(&back, "the certificate has expired").await;
        apply(&front, vec![client(&ca.issue(&[CLIENT]), port)]).await;
        assert!(get(out, "").await.starts_with("HTTP/1.1 200"));
    }

    async fn the_protocol_that_alpn_chooses_is_spoken() {
        let ca = Authority::new("root");
        let own = certificate(&ca.issue(&["h"]));
        let auto = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, auto_config: {}}}";
        let mut front = Vec::new();
        for (name, alpn) in [("two", "[h2, http/1.1]"), ("one", "[http/1.1]")] {
            let back = proxy(vec![
                cluster("app", origin().await, ""),
                listener("in", &format!("- {{{}, {}}}", http_to("app", ""), downstream(&format!("alpn_protocols: {alpn}, {own}"), "")), ""),
            ]).await;
            front.push(cluster(name, address(&back, "in").port(), &format!("{}\n{auto}", upstream("", ""))));
            front.push(listener(name, &format!("- {{{}}}", http_to(name, "")), ""));
            std::mem::forget(back);
        }
        let front = proxy(front).await;
        for name in ["two", "one"] {
            for _ in 0..3 {
                let answer = get(address(&front, name), "").await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{name}: {answer}");
            }
            stat(&front, &format!("cluster.{name}.upstream_cx_total"), 1).await;
        }
        stat(&front, "cluster.two.upstream_cx_http2_total", 1).await;
        stat(&front, "cluster.one.upstream_cx_http1_total", 1).await;
    }

    async fn a_tunnel_goes_by_the_protocol_that_alpn_chooses() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let ca = Authority::new("root");
        let own = certificate(&ca.issue(&["h"]));
        let auto = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, auto_config: {}}}";
        let uri = "access_log: [{name: f, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: PATH, log_format: {text_format_source: {inline_string: \"%UPSTREAM_TLS_VERSION% %RESPONSE_FLAGS%\\n\"}}}}]";
        let dir = tempfile::tempdir().expect("a directory");
        let connects = http_to("app", "http2_protocol_options: {allow_connect: true},")
            .replace("{match: {prefix: /}, route: {cluster: app}}", "{match: {connect_matcher: {}}, route: {cluster: app, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}}");
        for (alpn, http2) in [("[h2, http/1.1]", true), ("[http/1.1]", false)] {
            let back = proxy(vec![
                cluster("app", echo().await, ""),
                listener("in", &format!("- {{{connects}, {}}}", downstream(&format!("alpn_protocols: {alpn}, {own}"), "")), ""),
            ]).await;
            let log = dir.path().join(http2.to_string());
            let tunnel = tcp_to("b").replace("cluster: b", &format!("cluster: b, tunneling_config: {{hostname: \"h:1\"}}, {}", uri.replace("PATH", &format!("{log:?}"))));
            let front = proxy(vec![
                cluster("b", address(&back, "in").port(), &format!("{}\n{auto}", upstream("", ""))),
                listener("out", &format!("- {{{tunnel}}}"), ""),
            ]).await;
            let sent = vec![7; 300_000];
            for _ in 0..2 {
                let mut stream = tokio::net::TcpStream::connect(address(&front, "out")).await.expect("it listens");
                let (mut read, mut write) = stream.split();
                let send = async {
                    write.write_all(&sent).await.expect("it is open");
                    write.shutdown().await.expect("it is open");
                };
                let mut got = Vec::new();
                let ((), read) = within(async { tokio::join!(send, read.read_to_end(&mut got)) }).await;
                read.expect("it ends well");
                assert!(got == sent, "{alpn}");
            }
            stat(&back, "http.app.downstream_cx_http2_total", i64::from(http2)).await;
            stat(&front, "tcp.b.downstream_cx_tx_bytes_total", 600_000).await;
            stat(&front, "listener.out.downstream_cx_active", 0).await;
            front.shut_down();
            assert_eq!(std::fs::read_to_string(&log).expect("it was written"), "TLSv1.3 -\n".repeat(2));
        }
    }

    async fn tcp_goes_through_two_proxies_with_metadata_and_half_closes() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        const EXCHANGE: &str = "{name: istio.metadata_exchange, typed_config: {\"@type\": type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange, protocol: istio-peer-exchange}}";
        let ca = Authority::new("root");
        let own = format!("alpn_protocols: [istio-peer-exchange], {}", mutual(&ca.issue(&[SERVER]), &ca, &[CLIENT]));
        let chain = tcp_to("app").replace("filters: [", &format!("filters: [{EXCHANGE}, "));
        let back = proxy(vec![
            cluster("app", echo().await, ""),
            listener("in", &format!("- {{{chain}, {}}}", downstream(&own, ", require_client_certificate: true")), ""),
        ]).await;
        let port = address(&back, "in").port();
        let own = format!("alpn_protocols: [istio-peer-exchange, istio], {}", mutual(&ca.issue(&[CLIENT]), &ca, &[SERVER]));
        let front = proxy(vec![
            cluster("b", port, &format!("{}\nfilters: [{EXCHANGE}]", upstream(&own, ""))),
            listener("out", &format!("- {{{}}}", tcp_to("b")), ""),
        ]).await;
        let stream = tokio::net::TcpStream::connect(address(&front, "out")).await.expect("it listens");
        let (mut read, mut write) = stream.into_split();
        let sent = vec![7; 3_000_000];
        let bytes = sent.clone();
        let writer = tokio::task::spawn_local(async move {
            write.write_all(&bytes).await.expect("it is open");
            write.shutdown().await.expect("it is open");
        });
        let mut got = Vec::new();
        within(read.read_to_end(&mut got)).await.expect("it ends well");
        writer.await.expect("it ends");
        assert_eq!(got.len(), sent.len());
        assert!(got == sent);
        stat(&back, "listener.in.ssl.handshake", 1).await;
    }
}

/// Waits until the listener's last failure has this in its reason.
async fn said(server: &outrigger_proxy::server::Server, reason: &str) {
    let query = stats::Query::default();
    let end = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let text = server.store.text(&query);
        let line = text.lines().find(|line| line.contains("ssl.last_failure"));
        if line.is_some_and(|line| line.contains(reason)) {
            return;
        }
        assert!(tokio::time::Instant::now() < end, "{reason}: {line:?}");
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

fn sha256(leaf: &Leaf) -> String {
    read(&leaf.chain).fingerprint()
}

/// The first certificate of a PEM text.
fn read(pem: &str) -> tls::certificate::Certificate {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM");
    tls::certificate::Certificate::read(&der).expect("a certificate")
}
