//! Policies as users meet them: who is refused, how little the caller learns, and what the operator finds out.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use testkit::jwt::Issuer;

use crate::mesh::{Mesh, eventually};

const CLIENT: &str = "shop/client";
/// How long a change may take to be in force on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Objects in the mesh's folder, taken back when dropped.
struct Objects<'a>(&'a Mesh, &'static str);

impl<'a> Objects<'a> {
    fn new(mesh: &'a Mesh, file: &'static str, text: &str) -> Self {
        fs::write(mesh.folder.path().join(file), text).expect("write the objects");
        Self(mesh, file)
    }
}

impl Drop for Objects<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0.folder.path().join(self.1));
    }
}

/// An AuthorizationPolicy for the vault.
fn authorization(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: bank}}\n\
         spec: {{selector: {{matchLabels: {{app: vault}}}}, {spec}}}\n"
    )
}

/// The mesh's settings, beside what every mesh here has.
fn settings(text: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: {}}}\n",
        json!(text)
    )
}

/// What the client gets from the vault.
fn get(mesh: &Mesh, path: &str, headers: &[&str]) -> Value {
    let url = format!("http://vault.bank{path}");
    let mut args = vec![url.as_str()];
    args.extend(headers.iter().flat_map(|header| ["-H", *header]));
    mesh.call(CLIENT, &args)
}

fn becomes(mesh: &Mesh, status: u64, path: &str, headers: &[&str]) -> Value {
    let mut last = Value::Null;
    let begun = SystemTime::now();
    eventually(&format!("{path}: {status}"), SOON * 2, || {
        last = get(mesh, path, headers);
        let late = begun.elapsed().is_ok_and(|passed| passed > SOON);
        assert!(!late || last["status"] == status, "{path}: {last}");
        (last["status"] == status).then(|| last.clone())
    })
}

pub(crate) fn refusals_explain_themselves(mesh: &Mesh) {
    let text = authorization(
        "closed",
        "action: DENY, rules: [\
         {to: [{operation: {paths: ['/secret/*'], ports: ['8080']}}]}, \
         {to: [{operation: {ports: ['9000']}}], from: [{source: {principals: ['cluster.local/ns/shop/sa/default']}}]}]",
    );
    let policy = Objects::new(mesh, "policies.yaml", &text);
    // To who calls: that it may not, and nothing of the reason.
    let answer = becomes(mesh, 403, "/secret/plans", &[]);
    assert!(!answer.to_string().contains("closed"), "{answer}");
    assert_eq!(get(mesh, "/open", &[])["status"], 200);
    assert_eq!(becomes(mesh, 403, "/open/../secret/x", &[])["status"], 403);
    eventually("TCP is refused", SOON, || {
        let answer = mesh.call(CLIENT, &["tcp://vault.bank:9000", "-d", "hello"]);
        (!answer["line"].is_string()).then_some(())
    });
    // To who operates: the policy and its rule in the log, the object, file and line on demand.
    eventually("the log names the policy", SOON, || {
        let reason = "rbac_access_denied_matched_policy[ns[bank]-policy[closed]-rule[0]]";
        let log = mesh.log("bank", "vault", "istio-proxy");
        log.contains(reason).then_some(())
    });
    let check = || -> Vec<Value> {
        let shown = mesh.output(&["authz", "check", "vault", "-n", "bank", "-o", "json"]);
        serde_json::from_str(&shown).expect("JSON")
    };
    let rows = check();
    let row = rows.iter().find(|row| row["object"] == "closed.bank");
    let row = row.unwrap_or_else(|| panic!("{rows:?}"));
    assert_eq!(
        (&row["action"], &row["rules"], &row["inForce"]),
        (&json!("DENY"), &json!(2), &json!(true)),
        "{row}"
    );
    let file = row["file"].as_str().expect("a file");
    assert!(file.ends_with("policies.yaml"), "{row}");
    assert!(row["line"].as_u64().is_some_and(|line| line > 0), "{row}");
    let table = mesh.output(&["authz", "check", "vault", "-n", "bank"]);
    assert!(
        table.contains("closed.bank") && table.contains("policies.yaml"),
        "{table}"
    );
    drop(policy);
    becomes(mesh, 200, "/secret/plans", &[]);
    // Traffic may know it before who is asked by the tool.
    eventually("the tool forgets the policy", SOON, || {
        let gone = check().iter().all(|row| row["object"] != "closed.bank");
        gone.then_some(())
    });
}

pub(crate) fn tokens_are_asked_for(mesh: &Mesh) {
    let issuer = Issuer::new("ES256");
    let claims = |group: &str| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let until = now.expect("after 1970").as_secs() + 3600;
        json!({ "iss": "issuer.example", "sub": "somebody", "exp": until, "groups": ["staff", group] })
    };
    let bearer = |token: String| format!("Authorization: Bearer {token}");
    let text = format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: tokens, namespace: bank}}\n\
         spec: {{selector: {{matchLabels: {{app: vault}}}}, jwtRules: [{{issuer: issuer.example, jwks: {}}}]}}\n---\n{}",
        json!(issuer.jwks("k")),
        authorization(
            "admins",
            "action: ALLOW, rules: [{from: [{source: {requestPrincipals: ['issuer.example/*']}}], \
             when: [{key: 'request.auth.claims[groups]', values: [admins]}]}]"
        )
    );
    let _policy = Objects::new(mesh, "policies.yaml", &text);
    becomes(mesh, 403, "/x", &[]);
    let good = bearer(issuer.sign("k", &claims("admins")));
    becomes(mesh, 200, "/x", &[&good]);
    let guest = bearer(issuer.sign("k", &claims("guests")));
    becomes(mesh, 403, "/x", &[&guest]);
    let forged = bearer(Issuer::new("ES256").sign("k", &claims("admins")));
    becomes(mesh, 401, "/x", &[&forged]);
    becomes(mesh, 401, "/x", &["Authorization: Bearer a.b.c"]);
}

/// The provider's answer is the number that the path begins with.
pub(crate) fn custom_policies_ask_their_provider(mesh: &Mesh) {
    let provider = "extensionProviders:\n- name: guard\n  envoyExtAuthzHttp: \
                    {service: web.shop.svc.cluster.local, port: 80, pathPrefix: /status}\n";
    let _settings = Objects::new(mesh, "settings.yaml", &settings(provider));
    let text = authorization(
        "guarded",
        "action: CUSTOM, provider: {name: guard}, rules: [{to: [{operation: {paths: ['*/guarded']}}]}]",
    );
    let _policy = Objects::new(mesh, "policies.yaml", &text);
    becomes(mesh, 403, "/403/guarded", &[]);
    becomes(mesh, 200, "/200/guarded", &[]);
    becomes(mesh, 200, "/403/open", &[]);
}

pub(crate) fn aliases_of_the_trust_domain_change_while_it_runs(mesh: &Mesh) {
    let text = authorization(
        "migrated",
        "action: ALLOW, rules: [{from: [{source: {principals: ['old.example/ns/shop/sa/default']}}]}]",
    );
    let _policy = Objects::new(mesh, "policies.yaml", &text);
    becomes(mesh, 403, "/x", &[]);
    let alias = Objects::new(
        mesh,
        "settings.yaml",
        &settings("trustDomainAliases: [old.example]\n"),
    );
    becomes(mesh, 200, "/x", &[]);
    drop(alias);
    becomes(mesh, 403, "/x", &[]);
}
