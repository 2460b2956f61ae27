use std::{borrow::Cow, net::SocketAddr};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::plan::{matcher_tree::PeerName, read};

/// A request as far as policies can see.
#[derive(Debug, Default)]
struct Request {
    method: &'static str,
    host: &'static str,
    path: String,
    names: Option<Vec<String>>,
    port: u16,
    source: Option<IpAddr>,
    metadata: Value,
}

impl RequestView for Request {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        match name {
            ":method" => Some(Cow::Borrowed(self.method.as_bytes())),
            ":authority" => Some(Cow::Borrowed(self.host.as_bytes())),
            _ => None,
        }
    }

    fn host(&self) -> &[u8] {
        self.host.as_bytes()
    }

    fn path(&self) -> &[u8] {
        self.path.as_bytes()
    }

    fn dynamic_metadata(&self, _: &str) -> Option<&Value> {
        Some(&self.metadata)
    }

    fn destination(&self) -> Option<SocketAddr> {
        Some(([10, 0, 0, 9], self.port).into())
    }

    fn peer_names(&self, _: PeerName) -> Option<String> {
        Some(self.names.as_ref()?.join(","))
    }

    fn source(&self) -> Option<SocketAddr> {
        self.source.map(|ip| (ip, 5).into())
    }
}

impl Subject for Request {
    fn direct_remote(&self) -> Option<IpAddr> {
        self.source
    }

    fn remote(&self) -> Option<IpAddr> {
        self.source
    }

    fn names(&self) -> Option<impl Iterator<Item = &str>> {
        self.names.as_ref().map(|n| n.iter().map(String::as_str))
    }
}

fn rules(value: Value) -> Rules {
    let message = proto::json::from_value(&json!({"rules": value})).expect("a message");
    match read::rbac_for_tests(&message).expect("a plan").rules {
        Some(Engine::Rules(rules)) => rules,
        other => panic!("{other:?}"),
    }
}

fn any() -> Value {
    json!([{"any": true}])
}

#[test]
fn the_action_says_what_a_match_means() {
    let decide = |action: &str, path: &str| {
        let rules = rules(json!({"action": action, "policies": {
            "p": {"permissions": [{"urlPath": {"path": {"prefix": "/admin"}}}], "principals": any()},
        }}));
        let request = Request {
            path: path.to_owned(),
            ..Request::default()
        };
        let decision = rules.decide(&request);
        (decision.allowed, decision.policy.is_some())
    };
    assert_eq!(decide("ALLOW", "/admin?x"), (true, true));
    assert_eq!(decide("ALLOW", "/"), (false, false));
    assert_eq!(decide("DENY", "/admin"), (false, true));
    assert_eq!(decide("DENY", "/?/admin"), (true, false));
    assert_eq!(decide("LOG", "/"), (true, false));
}

#[test]
fn the_first_policy_by_name_decides() {
    let policy = json!({"permissions": any(), "principals": any()});
    let never = json!({"permissions": any(), "principals": [{"notId": {"any": true}}]});
    let rules = rules(json!({"policies": {"c": policy, "b": policy, "a": never}}));
    let request = Request::default();
    assert_eq!(rules.decide(&request).policy.map(|p| &**p), Some("b"));
}

#[test]
fn a_caller_is_who_its_certificate_says() {
    let who = |matcher: Value, names: Option<&[&str]>| {
        let rules = rules(json!({"policies": {"p": {
            "permissions": any(), "principals": [{"authenticated": matcher}],
        }}}));
        let request = Request {
            names: names.map(|all| all.iter().map(ToString::to_string).collect()),
            ..Request::default()
        };
        rules.decide(&request).allowed
    };
    let web = json!({"principalName": {"exact": "spiffe://c/ns/a/sa/web"}});
    assert!(who(web.clone(), Some(&["spiffe://c/ns/a/sa/web", ""])));
    assert!(!who(web.clone(), Some(&["spiffe://c/ns/a/sa/web2", ""])));
    // A certificate that nobody vouches for has no names; without TLS there is none.
    assert!(!who(web.clone(), Some(&[])));
    assert!(!who(web, None));
    assert!(who(json!({}), Some(&[])));
    assert!(!who(json!({}), None));
}

#[test]
fn a_tree_decides_by_its_first_branch_that_fits() {
    let action = |name: &str, action: &str| {
        json!({"action": {"name": "a", "typedConfig": {
            "@type": "type.googleapis.com/envoy.config.rbac.v3.Action", "name": name, "action": action,
        }}})
    };
    let input = |kind: &str| json!({"name": "i", "typedConfig": {"@type": format!("type.googleapis.com/envoy.extensions.matching.common_inputs.{kind}")}});
    let branch = |kind: &str, text: &str, then: Value| json!({"predicate": {"singlePredicate": {"input": input(kind), "valueMatch": {"exact": text}}}, "onMatch": then});
    let tree = json!({"matcher": {"matcherList": {"matchers": [
        branch("ssl.v3.UriSanInput", "spiffe://c/ns/a/sa/web", action("web", "ALLOW")),
        branch("network.v3.DestinationPortInput", "90", action("ninety", "DENY")),
        branch("network.v3.DestinationPortInput", "91", action("noted", "LOG")),
    ]}}});
    let message = proto::json::from_value(&tree).expect("a message");
    let engine = read::rbac_for_tests(&message).expect("a plan").rules;
    let engine = engine.expect("an engine");
    let decide = |name: &str, port: u16| {
        let request = Request {
            names: Some(vec![name.to_owned()]),
            port,
            ..Request::default()
        };
        let found = engine.decide(&request);
        let policy = found.policy.map(|name| name.to_string());
        (found.allowed, policy.unwrap_or_default(), found.logged)
    };
    let web = "spiffe://c/ns/a/sa/web";
    assert_eq!(decide(web, 90), (true, "web".to_owned(), Some(false)));
    assert_eq!(decide("", 90), (false, "ninety".to_owned(), Some(false)));
    assert_eq!(decide("", 91), (true, "noted".to_owned(), Some(true)));
    assert_eq!(decide("", 92), (false, String::new(), Some(false)));
    assert!(!engine.only_logs());

    let refused = |value: Value| {
        let message = proto::json::from_value(&value).expect("a message");
        read::rbac_for_tests(&message)
            .expect_err("refused")
            .to_string()
    };
    let mut both = tree.clone();
    both["rules"] = json!({});
    assert!(refused(both).contains("matcher: stands beside `rules`"));
    let other = json!({"matcher": {"onNoMatch": {"action": {"name": "a", "typedConfig": {
        "@type": "type.googleapis.com/envoy.config.route.v3.Route",
    }}}}});
    assert!(refused(other).contains("action of RBAC"));
}

#[test]
fn claims_are_found_by_their_path() {
    let rules = rules(
        json!({"policies": {"p": {"permissions": any(), "principals": [{"metadata": {
            "filter": "envoy.filters.http.jwt_authn",
            "path": [{"key": "payload"}, {"key": "groups"}],
            "value": {"orMatch": {"valueMatchers": [
                {"listMatch": {"oneOf": {"stringMatch": {"exact": "g1"}}}},
                {"stringMatch": {"exact": "g1"}},
            ]}},
        }}]}}}),
    );
    let decide = |groups: Value| {
        let metadata = json!({"payload": {"groups": groups}});
        rules
            .decide(&Request {
                metadata,
                ..Request::default()
            })
            .allowed
    };
    assert!(decide(json!("g1")) && decide(json!(["g0", "g1"])));
    assert!(!decide(json!("g2")) && !decide(json!({"g1": 1})) && !decide(json!([])));
    assert!(!rules.decide(&Request::default()).allowed);
}

#[test]
fn addresses_and_ports() {
    let rules = rules(json!({"policies": {"p": {
        "permissions": [{"andRules": {"rules": [
            {"destinationPortRange": {"start": 80, "end": 90}},
            {"destinationIp": {"addressPrefix": "10.0.0.0", "prefixLen": 8}},
        ]}}],
        "principals": [{"directRemoteIp": {"addressPrefix": "192.0.2.0", "prefixLen": 24}}],
    }}}));
    let decide = |port, source: &str| {
        let source = Some(source.parse().expect("address"));
        rules
            .decide(&Request {
                port,
                source,
                ..Request::default()
            })
            .allowed
    };
    assert!(decide(80, "192.0.2.7") && decide(89, "192.0.2.7"));
    assert!(!decide(90, "192.0.2.7") && !decide(80, "192.0.3.7"));
    // A client of a socket for both families.
    assert!(decide(80, "::ffff:192.0.2.7"));
}

/// A control plane of a later version may ask in ways that are not known here. To forget such a part would let in, or
/// shut out, others than were meant: the policy as a whole is refused, and the former one stays.
#[test]
fn a_rule_of_a_later_version_is_refused_and_not_forgotten() {
    use prost::Message;
    use proto::envoy::{
        config::rbac::v3 as pb, extensions::filters::http::rbac::v3::Rbac as Message_,
    };
    let plan = |action: i32, policy: &[u8]| {
        let policy = pb::Policy::decode(policy).expect("a policy");
        let rules = pb::Rbac {
            action,
            policies: [("p".to_owned(), policy)].into(),
            ..pb::Rbac::default()
        };
        read::rbac_for_tests(&Message_ {
            rules: Some(rules),
            ..Message_::default()
        })
        .map_err(|e| e.to_string())
    };
    // Field 1: permissions, field 2: principals; `any` is field 3 of each; nobody has a field 99.
    let (any, later): (&[u8], &[u8]) = (&[0x18, 1], &[0x9a, 0x06, 0x01, 0x00]);
    let policy = |permission: &[u8], principal: &[u8]| {
        let part = |number: u8, of: &[u8]| [&[number << 3 | 2, of.len() as u8], of].concat();
        [part(1, permission), part(2, principal)].concat()
    };
    plan(0, &policy(any, any)).expect("a sound policy");
    for (action, policy, words) in [
        (
            0,
            policy(any, later),
            r#"rules.policies["p"].principals[0]: needs an identifier"#,
        ),
        (
            1,
            policy(any, later),
            r#"rules.policies["p"].principals[0]: needs an identifier"#,
        ),
        (
            0,
            policy(later, any),
            r#"rules.policies["p"].permissions[0]: needs a rule"#,
        ),
        (77, policy(any, any), "rules.action"),
    ] {
        let refused = plan(action, &policy).expect_err(words);
        assert!(refused.starts_with(words), "{refused}");
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_its_path() {
    let message = proto::json::from_value(&json!({"rules": {"policies": {
        "p": {"permissions": [{"orRules": {"rules": [{"any": true}, {"matcher": {"name": "x"}}]}}], "principals": any()},
    }}}))
    .expect("a message");
    let errors = read::rbac_for_tests(&message)
        .expect_err("refused")
        .to_string();
    assert!(
        errors.contains("rules.policies[\"p\"].permissions[0].or_rules.rules[1].matcher"),
        "{errors}"
    );
}

prop_compose! {
    fn policy()(
        names in prop::option::of(prop::collection::vec("[ab]", 1..3)),
        paths in prop::option::of(prop::collection::vec("/[ab]", 1..3)),
        port in prop::option::of(1..4_u16),
        not in proptest::bool::ANY,
    ) -> Value {
        let mut all = vec![json!({"any": true})];
        if let Some(paths) = paths {
            let each: Vec<_> = paths.iter().map(|p| json!({"urlPath": {"path": {"exact": p}}})).collect();
            all.push(json!({"orRules": {"rules": each}}));
        }
        if let Some(port) = port {
            let rule = json!({"destinationPort": port});
            all.push(if not { json!({"notRule": rule}) } else { rule });
        }
        let principals = match names {
            None => any(),
            Some(names) => {
                let each: Vec<_> = names.iter().map(|n| json!({"authenticated": {"principalName": {"exact": n}}})).collect();
                json!(each)
            }
        };
        json!({"permissions": [{"andRules": {"rules": all}}], "principals": principals})
    }
}

proptest! {
    /// The table never hides a policy that matches, nor changes which one comes first.
    #[test]
    fn the_index_decides_as_asking_all_would(
        policies in prop::collection::vec(policy(), 1..8),
        names in prop::option::of(prop::collection::vec("[abc]", 0..3)),
        path in "/[abc](\\?x)?",
        port in 0..4_u16,
    ) {
        let named: serde_json::Map<_, _> = policies
            .into_iter()
            .enumerate()
            .map(|(i, p)| (format!("p{i}"), p))
            .collect();
        let rules = rules(json!({"policies": named}));
        let request = Request { names, path, port, ..Request::default() };
        let naive = rules.policies.iter().find(|(_, p)| p.matches(&request)).map(|(n, _)| n);
        prop_assert_eq!(rules.decide(&request).policy, naive);
    }
}
