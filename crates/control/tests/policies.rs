//! AuthorizationPolicy and RequestAuthentication beyond what the captures show: providers, dry run, aliases, mistakes.

use std::{path::Path, sync::Arc};

use config::Snapshot;
use outrigger_control::{
    listener,
    model::{Mesh, Node, Proxy, Settings},
    security::{self, keys::KeySets},
};
use proto::envoy::config::core::v3::Node as EnvoyNode;
use serde_json::{Value, json};

const PODS: &str = r"
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomain: new.example
    trustDomainAliases: [old.example]
    extensionProviders:
    - name: opa
      envoyExtAuthzGrpc: {service: opa.shop.svc.cluster.local, port: 9191, failOpen: true, timeout: 1s}
    - name: web-auth
      envoyExtAuthzHttp:
        service: opa.shop.svc.cluster.local
        port: 8000
        pathPrefix: /check
        statusOnError: '503'
        includeRequestHeadersInCheck: [cookie, x-auth-*]
        headersToUpstreamOnAllow: [x-user]
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}}
spec: {containers: [{name: web, image: web, ports: [{containerPort: 8080}]}]}
status: {phase: Running, podIP: 10.1.0.1, podIPs: [{ip: 10.1.0.1}], conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: opa, namespace: shop}
spec: {clusterIP: 10.96.0.2, selector: {app: opa}, ports: [{name: grpc, port: 9191}, {name: http, port: 8000}]}
---
";

fn policy(name: &str, body: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: shop{}}}\nspec: {body}\n",
        if name.starts_with("dry") {
            ", annotations: {istio.io/dry-run: 'true'}"
        } else {
            ""
        }
    )
}

fn snapshot(text: &str) -> Snapshot {
    let all = format!("{PODS}{text}");
    Snapshot::from_texts([(Path::new("shop.yaml"), all.as_str())]).0
}

/// The HTTP filters and the network filters of the chain of port 8080 and of the catch-all chain.
fn filters(text: &str) -> (Vec<Value>, Vec<Value>) {
    filters_of(text, json!({}))
}

/// The same for a proxy that says more of itself.
fn filters_of(text: &str, more: Value) -> (Vec<Value>, Vec<Value>) {
    let mut metadata = json!({
        "NAMESPACE": "shop", "CLUSTER_ID": "Kubernetes", "INSTANCE_IPS": "10.1.0.1", "LABELS": {"app": "web"}
    });
    let more = more.as_object().expect("an object").clone();
    metadata.as_object_mut().expect("an object").extend(more);
    let mesh = Mesh::new(Arc::new(snapshot(text)), Settings::default(), None);
    let node: EnvoyNode = proto::json::from_value(&json!({
        "id": "sidecar~10.1.0.1~web-0.shop~shop.svc.cluster.local",
        "metadata": metadata,
    }))
    .expect("node");
    let proxy = Proxy::new(&mesh, Arc::new(Node::parse(&node).expect("node")));
    let inbound = listener::build(&mesh, &proxy)
        .into_iter()
        .find(|r| r.name == "virtualInbound")
        .expect("an inbound listener");
    let inbound = proto::json::any_to_value(&inbound.any());
    let chains = inbound["filterChains"].as_array().expect("chains");
    let of = |name: &str, filter: &str| -> Value {
        let chain = chains.iter().find(|c| c["name"] == name).expect(name);
        let all = chain["filters"].as_array().expect("filters");
        match filter {
            "" => json!(all),
            _ => all
                .iter()
                .find(|f| f["name"] == filter)
                .expect(filter)
                .clone(),
        }
    };
    let http = of(
        "0.0.0.0_8080",
        "envoy.filters.network.http_connection_manager",
    );
    let http = http["typedConfig"]["httpFilters"].as_array().expect("http");
    let tcp = of("virtualInbound", "");
    let wanted = |all: &[Value]| {
        all.iter()
            .filter(|f| {
                let name = f["name"].as_str().unwrap_or_default();
                ["rbac", "ext_authz", "jwt_authn"]
                    .iter()
                    .any(|n| name.ends_with(n))
            })
            .map(|f| f["typedConfig"].clone())
            .collect()
    };
    (wanted(http), wanted(tcp.as_array().expect("tcp")))
}

#[test]
fn a_provider_over_grpc_is_asked_where_a_custom_policy_matches() {
    let body =
        "{action: CUSTOM, provider: {name: opa}, rules: [{to: [{operation: {paths: [/admin*]}}]}]}";
    let (http, tcp) = filters(&policy("ask", body));
    let name = "istio-ext-authz-opa-ns[shop]-policy[ask]-rule[0]";
    assert_eq!(http[0]["shadowRulesStatPrefix"], "istio_ext_authz_");
    assert_eq!(http[0]["shadowRules"]["action"], "DENY");
    assert!(http[0]["shadowRules"]["policies"][name].is_object());
    assert!(http[0].get("rules").is_none());
    assert_eq!(
        http[1]["grpcService"],
        json!({
            "envoyGrpc": {
                "clusterName": "outbound|9191||opa.shop.svc.cluster.local",
                "authority": "opa.shop.svc.cluster.local"
            },
            "timeout": "1s"
        })
    );
    assert_eq!(http[1]["failureModeAllow"], true);
    assert_eq!(
        http[1]["filterEnabledMetadata"],
        json!({
            "filter": "envoy.filters.http.rbac",
            "path": [{"key": "istio_ext_authz_shadow_effective_policy_id"}],
            "value": {"stringMatch": {"prefix": "istio-ext-authz-opa"}}
        })
    );
    // A connection has no path: the rule asks about every connection rather than about none.
    let rule = &tcp[0]["shadowRules"]["policies"][name]["permissions"][0];
    assert_eq!(rule, &json!({"andRules": {"rules": [{"any": true}]}}));
    assert_eq!(tcp[1]["statPrefix"], "tcp.");
}

#[test]
fn a_provider_over_http_judges_requests_only() {
    let body = "{action: CUSTOM, provider: {name: web-auth}, rules: [{}]}";
    let (http, tcp) = filters(&policy("ask", body));
    let service = &http[1]["httpService"];
    assert_eq!(
        service["serverUri"],
        json!({
            "uri": "http://opa.shop.svc.cluster.local",
            "cluster": "outbound|8000||opa.shop.svc.cluster.local",
            "timeout": "600s"
        })
    );
    assert_eq!(service["pathPrefix"], "/check");
    assert_eq!(
        http[1]["statusOnError"],
        json!({"code": "ServiceUnavailable"})
    );
    assert_eq!(
        http[1]["allowedHeaders"]["patterns"],
        json!([{"exact": "cookie", "ignoreCase": true}, {"prefix": "x-auth-", "ignoreCase": true}])
    );
    assert!(tcp.is_empty(), "{tcp:?}");
}

#[test]
fn what_an_unknown_provider_would_judge_is_denied_and_told() {
    let text = policy(
        "ask",
        "{action: CUSTOM, provider: {name: nobody}, rules: [{}]}",
    );
    let (http, tcp) = filters(&text);
    let name = "istio-ext-authz-nobody-ns[shop]-policy[ask]-rule[0]-deny-due-to-bad-CUSTOM-action";
    for filter in [&http[0], &tcp[0]] {
        assert_eq!(filter["rules"]["action"], "DENY");
        assert!(filter["rules"]["policies"][name].is_object(), "{filter}");
    }
    let problems = security::problems(&snapshot(&text), Some(&KeySets::default()));
    let shown = problems[0].to_string();
    assert!(
        shown.contains("AuthorizationPolicy shop/ask") && shown.contains("provider \"nobody\""),
        "{shown}"
    );
}

#[test]
fn a_dry_run_is_counted_and_not_enforced() {
    let (http, tcp) = filters(&policy("dry", "{action: DENY, rules: [{}]}"));
    for filter in [&http[0], &tcp[0]] {
        assert!(filter.get("rules").is_none(), "{filter}");
        assert_eq!(filter["shadowRulesStatPrefix"], "istio_dry_run_deny_");
        assert!(filter["shadowRules"]["policies"]["ns[shop]-policy[dry]-rule[0]"].is_object());
    }
}

#[test]
fn a_dry_run_of_a_custom_policy_asks_nobody_and_refuses_nothing() {
    let body = |path: &str| {
        format!(
            "{{action: CUSTOM, provider: {{name: opa}}, rules: [{{to: [{{operation: {{paths: [{path}]}}}}]}}]}}"
        )
    };
    let dry = policy("dry", &body("/dry"));
    let name = "istio-ext-authz-opa-ns[shop]-policy[dry]-rule[0]";
    let (http, tcp) = filters(&dry);
    assert_eq!((http.len(), tcp.len()), (1, 1), "{http:?} {tcp:?}");
    for filter in [&http[0], &tcp[0]] {
        assert!(filter.get("rules").is_none(), "{filter}");
        assert_eq!(filter["shadowRulesStatPrefix"], "istio_dry_run_custom_");
        assert!(filter["shadowRules"]["policies"][name].is_object());
    }
    // Beside one that is enforced it stays what it is.
    let (http, tcp) = filters(&format!("{dry}{}", policy("ask", &body("/asked"))));
    assert_eq!((http.len(), tcp.len()), (3, 3), "{http:?} {tcp:?}");
    for filter in [&http[1], &tcp[1]] {
        assert!(filter.get("rules").is_none(), "{filter}");
        assert_eq!(filter["shadowRulesStatPrefix"], "istio_ext_authz_");
        assert!(filter["shadowRules"]["policies"].get(name).is_none());
    }
}

#[test]
fn callers_are_meant_under_every_trust_domain_of_the_mesh() {
    let body = "{rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]}";
    let (http, _) = filters(&policy("who", body));
    let ids = &http[0]["rules"]["policies"]["ns[shop]-policy[who]-rule[0]"]["principals"][0]["andIds"]
        ["ids"][0]["orIds"]["ids"];
    let names: Vec<_> = (0..2)
        .map(|i| ids[i]["authenticated"]["principalName"]["exact"].as_str())
        .collect();
    assert_eq!(
        names,
        [
            Some("spiffe://new.example/ns/shop/sa/web"),
            Some("spiffe://old.example/ns/shop/sa/web")
        ]
    );
}

#[test]
fn a_policy_without_rules_allows_nothing() {
    let (http, tcp) = filters(&policy("none", "{}"));
    for filter in [&http[0], &tcp[0]] {
        let rule = &filter["rules"]["policies"]["ns[shop]-policy[none]-rule[0]"];
        assert_eq!(rule["permissions"], json!([{"notRule": {"any": true}}]));
    }
}

#[test]
fn an_allowing_rule_that_tcp_cannot_express_is_left_out_there() {
    let body =
        "{rules: [{to: [{operation: {methods: [GET]}}]}, {to: [{operation: {ports: ['81']}}]}]}";
    let (http, tcp) = filters(&policy("get", body));
    let names = |f: &Value| -> Vec<String> {
        let all = f["rules"]["policies"].as_object().expect("policies");
        all.keys().cloned().collect()
    };
    assert_eq!(names(&http[0]).len(), 2);
    assert_eq!(names(&tcp[0]), ["ns[shop]-policy[get]-rule[1]"]);
}

#[test]
fn tokens_of_several_issuers_and_keys_that_are_not_known() {
    let text = "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
        metadata: {name: jwt, namespace: shop}\nspec:\n  jwtRules:\n\
        \x20 - {issuer: b.example, jwksUri: 'https://b.example/keys'}\n\
        \x20 - {issuer: a.example, jwks: '{\"keys\":[]}', spaceDelimitedClaims: [roles]}\n";
    let (http, _) = filters(text);
    assert_eq!(http[0]["providers"]["origins-0"]["issuer"], "a.example");
    assert_eq!(
        http[0]["providers"]["origins-0"]["normalizePayloadInMetadata"]["spaceDelimitedClaims"],
        json!(["permission", "roles", "scope"])
    );
    let any = &http[0]["rules"][0]["requires"]["requiresAny"]["requirements"];
    assert_eq!(any[1], json!({"providerName": "origins-1"}));
    assert_eq!(
        any[2]["requiresAll"]["requirements"]
            .as_array()
            .map(Vec::len),
        Some(2)
    );
    let keys = &http[0]["providers"]["origins-1"]["localJwks"]["inlineString"];
    assert!(keys.as_str().is_some_and(|k| k.contains("RSA")), "{keys}");
    let problems = security::problems(&snapshot(text), Some(&KeySets::default()));
    assert!(problems[0].to_string().contains("spec.jwtRules[0].jwksUri"));
}

/// A name is a text: its dots, stars and brackets stand for themselves, but for a star at one end.
#[test]
fn names_are_no_patterns() {
    let source = r#"{namespaces: ["a.b(c"], principals: ["old.example/ns/a/sa/x.y", "t*d/ns/a/sa/x", "*/sa/x.[y]"]}"#;
    let account = r#"{serviceAccounts: ["a.b/x.y+z"]}"#;
    let (http, _) = filters(&policy(
        "names",
        &format!(
            "{{rules: [{{from: [{{source: {source}}}]}}, {{from: [{{source: {account}}}]}}]}}"
        ),
    ));
    let text = http[0].to_string().replace("\\\\", "\\");
    for wanted in [
        r#""regex":".*/ns/a\.b\(c/.*""#,
        r#""exact":"spiffe://old.example/ns/a/sa/x.y""#,
        r#""exact":"spiffe://t*d/ns/a/sa/x""#,
        r#""regex":"spiffe://.*/sa/x\.\[y\]""#,
        r#""regex":"spiffe://.+/ns/a\.b/(.+/|)sa/x\.y\+z(/.+)?""#,
    ] {
        assert!(text.contains(wanted), "{wanted} is missing in {text}");
    }
}

/// Proxies are older or newer than their control plane for as long as an upgrade takes: what they enforce is the same.
#[test]
fn a_proxy_of_another_version_enforces_the_same() {
    let all = policy(
        "allow",
        "{rules: [{from: [{source: {principals: ['*/ns/shop/sa/web'], notNamespaces: [x]}}], \
         to: [{operation: {methods: [GET], paths: ['/a/*']}}], when: [{key: 'request.headers[x]', values: [y]}]}]}",
    ) + &policy(
        "deny",
        "{action: DENY, rules: [{to: [{operation: {ports: ['8080']}}]}]}",
    ) + &policy(
        "ask",
        "{action: CUSTOM, provider: {name: opa}, rules: [{to: [{operation: {paths: [/admin*]}}]}]}",
    ) + &policy(
        "dry",
        "{action: DENY, rules: [{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}]}",
    );
    let ours = filters_of(&all, json!({"ISTIO_VERSION": "1.30.0"}));
    assert!(ours.0.len() > 2 && ours.1.len() > 1, "{ours:?}");
    for version in [
        "1.26.0",
        "1.28.0",
        "1.29.9",
        "1.31.0-beta.1",
        "1.32.0",
        "2.0.0",
        "latest",
        "",
    ] {
        let theirs = filters_of(&all, json!({"ISTIO_VERSION": version}));
        assert_eq!(ours, theirs, "{version:?}");
    }
    assert_eq!(ours, filters(&all));
}
