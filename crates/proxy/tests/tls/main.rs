//! TLS as peers see it: handshakes that work, handshakes that must not, secrets that change.

mod support;

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
                downstream(&format!("alpn_protocols: [h2, http/1.1], {}", mutual(&ca.issue(&[SERVER]), &ca, &[CLIENT])), ", require_client_certificate: true")), ""),
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
    }
}
