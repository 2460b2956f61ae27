//! AuthorizationPolicy and RequestAuthentication: what a workload enforces, as filters of Envoy.
//!
//! [`Policies`] finds the objects of a workload; [`Enforcement`] is what comes out of them for one proxy, built once and
//! put into each of its inbound chains. The order in a chain is CUSTOM, tokens, then AUDIT, DENY and ALLOW.

mod attribute;
mod ext_authz;
mod fetch;
mod jwt;
pub mod keys;
mod matchers;
mod rule;
mod trust_domain;

use std::{collections::BTreeMap, sync::Arc};

use config::{Kind, Object, ObjectKey, Problem, Severity, Snapshot, labels_match};
use proto::{
    any,
    envoy::{
        config::{
            listener::v3::Filter,
            rbac::v3::{Policy, Rbac, rbac::Action},
        },
        extensions::filters::{
            http::rbac::v3::Rbac as HttpRbac,
            network::{http_connection_manager::v3::HttpFilter, rbac::v3::Rbac as NetworkRbac},
        },
    },
    istio::security::v1beta1::{
        AuthorizationPolicy, JwtRule, RequestAuthentication,
        authorization_policy::{Action as PolicyAction, ActionDetail},
    },
    istio::r#type::v1beta1::{PolicyTargetReference, WorkloadSelector},
};
use tls::jwt::KeySet;

use self::{ext_authz::BadProvider, keys::KeySets, rule::Place, trust_domain::TrustDomains};
use crate::{
    listener::filters,
    model::{Labels, Mesh, Origin, Proxy},
};

/// Name of the HTTP filter, and of the metadata that it leaves behind.
const HTTP_RBAC: &str = "envoy.filters.http.rbac";
const NETWORK_RBAC: &str = "envoy.filters.network.rbac";
const HTTP_EXT_AUTHZ: &str = "envoy.filters.http.ext_authz";
const NETWORK_EXT_AUTHZ: &str = "envoy.filters.network.ext_authz";
const TCP_STAT_PREFIX: &str = "tcp.";
const DRY_RUN: &str = "istio.io/dry-run";
/// Before the statistics and metadata of CUSTOM policies that are only evaluated.
const DRY_RUN_CUSTOM: &str = "istio_dry_run_custom_";
/// Pods of a Gateway API gateway carry its name; only policies that name the gateway, or its labels, are theirs.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// What a proxy enforces on its inbound side, or, at a gateway, on all of it.
#[derive(Debug, Clone, Default)]
pub struct Enforcement {
    /// In the order of the chain, before everything that belongs to routing.
    pub http: Vec<HttpFilter>,
    pub tcp: Vec<Filter>,
    /// The objects behind the filters.
    pub from: Vec<Origin>,
}

/// An object that a proxy enforces.
#[derive(Debug, Clone)]
pub struct Selected {
    /// The object, with its file and line.
    pub origin: Origin,
    /// `ALLOW`, `DENY`, `AUDIT` or `CUSTOM`; `None` for a RequestAuthentication.
    pub action: Option<&'static str>,
    /// Only evaluated, into statistics and logs.
    pub dry_run: bool,
    /// How many rules it has.
    pub rules: usize,
    /// The issuers whose tokens are asked for.
    pub issuers: Vec<String>,
}

/// All policies, oldest first in each namespace.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    root: String,
    authorization: ByNamespace<AuthorizationPolicy>,
    authentication: ByNamespace<RequestAuthentication>,
}

type ByNamespace<T> = BTreeMap<String, Vec<Arc<Object<T>>>>;

impl Policies {
    /// Indexes the objects.
    pub fn new(
        authorization: Vec<Arc<Object<AuthorizationPolicy>>>,
        authentication: Vec<Arc<Object<RequestAuthentication>>>,
        root: &str,
    ) -> Self {
        Self {
            root: root.to_owned(),
            authorization: by_namespace(authorization),
            authentication: by_namespace(authentication),
        }
    }

    /// What `proxy` enforces.
    pub fn of_proxy(&self, mesh: &Mesh, proxy: &Proxy) -> Enforcement {
        let workload @ (namespace, _) = (proxy.namespace(), &proxy.labels);
        // The root namespace's come first where they add up, the workload's own first where an issuer is chosen.
        let authorization = self.selected(&self.authorization, [&self.root, namespace], workload);
        let authentication = self.selected(&self.authentication, [namespace, &self.root], workload);
        let mut out = Enforcement {
            from: authorization
                .iter()
                .map(|o| Origin::of(Kind::AuthorizationPolicy, o))
                .chain(
                    authentication
                        .iter()
                        .map(|o| Origin::of(Kind::RequestAuthentication, o)),
                )
                .collect(),
            ..Enforcement::default()
        };
        let builder = Builder {
            mesh,
            trust_domains: TrustDomains::of(mesh.config()),
        };
        let of = |action: PolicyAction| -> Vec<&Object<AuthorizationPolicy>> {
            let all = authorization.iter().map(|o| &***o);
            all.filter(|o| o.spec.action() == action).collect()
        };
        builder.custom(&of(PolicyAction::Custom), &mut out);
        let rules = authentication.iter().flat_map(|o| &o.spec.jwt_rules);
        out.http
            .extend(jwt::filter(rules.collect(), proxy.is_router()));
        for (of_policy, action) in [
            (PolicyAction::Audit, Action::Log),
            (PolicyAction::Deny, Action::Deny),
            (PolicyAction::Allow, Action::Allow),
        ] {
            builder.local(&of(of_policy), action, &mut out);
        }
        out
    }

    /// The objects that a proxy enforces, in the order in which they are asked.
    pub fn selection(&self, proxy: &Proxy) -> Vec<Selected> {
        let workload @ (namespace, _) = (proxy.namespace(), &proxy.labels);
        let authentication = self.selected(&self.authentication, [namespace, &self.root], workload);
        let mut out: Vec<Selected> = authentication
            .into_iter()
            .map(|o| Selected {
                origin: Origin::of(Kind::RequestAuthentication, o),
                action: None,
                dry_run: false,
                rules: o.spec.jwt_rules.len(),
                issuers: o.spec.jwt_rules.iter().map(|r| r.issuer.clone()).collect(),
            })
            .collect();
        let authorization = self.selected(&self.authorization, [&self.root, namespace], workload);
        for action in [
            PolicyAction::Custom,
            PolicyAction::Audit,
            PolicyAction::Deny,
            PolicyAction::Allow,
        ] {
            let of_action = authorization.iter().filter(|o| o.spec.action() == action);
            out.extend(of_action.map(|o| Selected {
                origin: Origin::of(Kind::AuthorizationPolicy, o),
                action: Some(action.as_str_name()),
                dry_run: is_dry_run(o),
                rules: o.spec.rules.len(),
                issuers: Vec::new(),
            }));
        }
        out
    }

    /// The objects of the root namespace and of the workload's own that are meant for it, in the order of `namespaces`.
    fn selected<'a, T: Attached>(
        &self,
        all: &'a ByNamespace<T>,
        namespaces: [&str; 2],
        workload: (&str, &Labels),
    ) -> Vec<&'a Arc<Object<T>>> {
        let [first, second] = namespaces;
        std::iter::once(first)
            .chain((second != first).then_some(second))
            .filter_map(|namespace| all.get(namespace))
            .flatten()
            .filter(|o| is_attached(o, workload))
            .collect()
    }
}

/// Policies that cannot be enforced as they are written, for the log and `/debug/problems`. Without `keys`, nothing is
/// said of those that are fetched.
pub fn problems(snapshot: &Snapshot, keys: Option<&KeySets>) -> Vec<Problem> {
    let trust_domains = TrustDomains::of(&snapshot.mesh);
    let mut out = Vec::new();
    for object in snapshot.authorization_policies.iter() {
        let mut add = |severity, field: String, message: String| {
            out.push(Problem {
                severity,
                file: object.source.file.clone(),
                line: object.source.line,
                object: Some(ObjectKey::new(
                    Kind::AuthorizationPolicy,
                    &*object.meta.namespace,
                    &*object.meta.name,
                )),
                field,
                message,
            });
        };
        let action = object.spec.action();
        if action == PolicyAction::Custom
            && let Err(error) = ext_authz::provider(&snapshot.mesh, provider_of(&object.spec))
        {
            let message =
                format!("{error}; what the policy matches is denied until this is mended");
            add(Severity::Error, "spec.provider.name".to_owned(), message);
        }
        for (index, rule) in object.spec.rules.iter().enumerate() {
            // Most forgiving for actions other than ALLOW; asked as ALLOW, every mistake is seen.
            let place = Place {
                namespace: &object.meta.namespace,
                tcp: false,
                action: Action::Allow,
                trust_domains: &trust_domains,
            };
            if let Err(error) = rule::policy(rule, place) {
                let message = match action {
                    PolicyAction::Allow => {
                        format!("{error}; the rule is left out and allows nothing")
                    }
                    _ => format!("{error}; the rule matches more than it says"),
                };
                add(Severity::Error, format!("spec.rules[{index}]"), message);
            }
        }
    }
    for object in snapshot.request_authentications.iter() {
        for (index, rule) in object.spec.jwt_rules.iter().enumerate() {
            let Some((severity, field, message)) = key_problem(rule, keys) else {
                continue;
            };
            out.push(Problem {
                severity,
                file: object.source.file.clone(),
                line: object.source.line,
                object: Some(ObjectKey::new(
                    Kind::RequestAuthentication,
                    &*object.meta.namespace,
                    &*object.meta.name,
                )),
                field: format!("spec.jwtRules[{index}].{field}"),
                message,
            });
        }
    }
    out
}

/// What is wrong with the keys of a rule: how bad it is, where, and what.
fn key_problem(rule: &JwtRule, keys: Option<&KeySets>) -> Option<(Severity, &'static str, String)> {
    let issuer = &rule.issuer;
    if !rule.jwks.is_empty() {
        let error = KeySet::parse(rule.jwks.as_bytes()).err()?;
        let message = format!("{error}; every token of {issuer:?} is refused until this is mended");
        return Some((Severity::Error, "jwks", message));
    }
    let field = match &*rule.jwks_uri {
        "" => "issuer",
        _ => "jwksUri",
    };
    match keys?.state(rule) {
        Ok(None) => None,
        Ok(Some(why)) => {
            let message = format!(
                "the keys of {issuer:?} cannot be renewed, the old ones stay in force: {why}"
            );
            Some((Severity::Warning, field, message))
        }
        Err(why) => {
            let message =
                format!("there are no keys, so every token of {issuer:?} is refused: {why}");
            Some((Severity::Error, field, message))
        }
    }
}

struct Builder<'a> {
    mesh: &'a Mesh,
    trust_domains: TrustDomains,
}

impl Builder<'_> {
    /// ALLOW, DENY or AUDIT: one filter for HTTP, one for TCP.
    fn local(
        &self,
        policies: &[&Object<AuthorizationPolicy>],
        action: Action,
        out: &mut Enforcement,
    ) {
        if policies.is_empty() {
            return;
        }
        let (dry, enforced): (Vec<_>, Vec<_>) =
            policies.iter().copied().partition(|o| is_dry_run(o));
        let rules = |of: &[&Object<AuthorizationPolicy>], tcp| {
            (!of.is_empty()).then(|| self.rbac(of, action, tcp, None))
        };
        let shadow_prefix = match (dry.is_empty(), action) {
            // The prefix of no rules is the one of the default action.
            (true, _) | (false, Action::Allow) => "istio_dry_run_allow_",
            (false, Action::Deny) => "istio_dry_run_deny_",
            (false, Action::Log) => "",
        };
        let http = HttpRbac {
            rules: rules(&enforced, false),
            shadow_rules: rules(&dry, false),
            shadow_rules_stat_prefix: shadow_prefix.to_owned(),
            ..Default::default()
        };
        out.http.push(filters::http(HTTP_RBAC, any::pack(&http)));
        let tcp = NetworkRbac {
            stat_prefix: TCP_STAT_PREFIX.to_owned(),
            rules: rules(&enforced, true),
            shadow_rules: rules(&dry, true),
            shadow_rules_stat_prefix: shadow_prefix.to_owned(),
            ..Default::default()
        };
        out.tcp
            .push(filters::network(NETWORK_RBAC, any::pack(&tcp)));
    }

    /// CUSTOM: an RBAC filter that only notes which policy matches, and the filter that asks the provider if one does.
    fn custom(&self, policies: &[&Object<AuthorizationPolicy>], out: &mut Enforcement) {
        let mut providers: BTreeMap<&str, Vec<&Object<AuthorizationPolicy>>> = BTreeMap::new();
        for policy in policies.iter().copied() {
            providers
                .entry(provider_of(&policy.spec))
                .or_default()
                .push(policy);
        }
        // Who decides must be clear: with two providers nobody does, and all that they would judge is denied.
        let several = providers.len() > 1;
        for (provider, policies) in providers {
            let (dry, enforced): (Vec<_>, Vec<_>) =
                policies.into_iter().partition(|o| is_dry_run(o));
            let rbac = |of: &[&Object<_>], tcp| self.rbac(of, Action::Deny, tcp, Some(provider));
            let found = if several {
                Err(None)
            } else {
                ext_authz::filters(self.mesh.config(), self.mesh.services(), provider).map_err(Some)
            };
            match found {
                Ok(ask) => {
                    // istiod has these enforced, as DENY: a dry run that refuses what it matches.
                    if !dry.is_empty() {
                        let http = HttpRbac {
                            shadow_rules: Some(rbac(&dry, false)),
                            shadow_rules_stat_prefix: DRY_RUN_CUSTOM.to_owned(),
                            ..Default::default()
                        };
                        out.http.push(filters::http(HTTP_RBAC, any::pack(&http)));
                        let tcp = NetworkRbac {
                            stat_prefix: TCP_STAT_PREFIX.to_owned(),
                            shadow_rules: Some(rbac(&dry, true)),
                            shadow_rules_stat_prefix: DRY_RUN_CUSTOM.to_owned(),
                            ..Default::default()
                        };
                        out.tcp
                            .push(filters::network(NETWORK_RBAC, any::pack(&tcp)));
                    }
                    if enforced.is_empty() {
                        continue;
                    }
                    let shadow = |tcp| Some(rbac(&enforced, tcp));
                    let http = HttpRbac {
                        shadow_rules: shadow(false),
                        shadow_rules_stat_prefix: ext_authz::STAT_PREFIX.to_owned(),
                        ..Default::default()
                    };
                    out.http.push(filters::http(HTTP_RBAC, any::pack(&http)));
                    out.http.push(filters::http(HTTP_EXT_AUTHZ, ask.http));
                    if let Some(ask) = ask.tcp {
                        let tcp = NetworkRbac {
                            stat_prefix: TCP_STAT_PREFIX.to_owned(),
                            shadow_rules: shadow(true),
                            shadow_rules_stat_prefix: ext_authz::STAT_PREFIX.to_owned(),
                            ..Default::default()
                        };
                        out.tcp
                            .push(filters::network(NETWORK_RBAC, any::pack(&tcp)));
                        out.tcp.push(filters::network(NETWORK_EXT_AUTHZ, ask));
                    }
                }
                Err(error) => {
                    self.warn(provider, error.as_ref());
                    let http = HttpRbac {
                        rules: Some(denied(rbac(&enforced, false))),
                        ..Default::default()
                    };
                    out.http.push(filters::http(HTTP_RBAC, any::pack(&http)));
                    let tcp = NetworkRbac {
                        stat_prefix: TCP_STAT_PREFIX.to_owned(),
                        rules: Some(denied(rbac(&enforced, true))),
                        ..Default::default()
                    };
                    out.tcp
                        .push(filters::network(NETWORK_RBAC, any::pack(&tcp)));
                }
            }
        }
    }

    fn warn(&self, provider: &str, error: Option<&BadProvider>) {
        match error {
            Some(error) => {
                tracing::warn!("CUSTOM policies of {provider:?} deny all they match: {error}")
            }
            None => tracing::warn!(
                "CUSTOM policies of {provider:?} deny all they match: another provider's select the same workload; \
                 use one provider for a workload"
            ),
        }
    }

    fn rbac(
        &self,
        policies: &[&Object<AuthorizationPolicy>],
        action: Action,
        tcp: bool,
        provider: Option<&str>,
    ) -> Rbac {
        let mut out = BTreeMap::new();
        for policy in policies {
            let name = |index| policy_name(policy, index, provider);
            for (index, rule) in policy.spec.rules.iter().enumerate() {
                let place = Place {
                    namespace: &policy.meta.namespace,
                    tcp,
                    action,
                    trust_domains: &self.trust_domains,
                };
                if let Ok(rule) = rule::policy(rule, place) {
                    out.insert(name(index), rule);
                }
            }
            if policy.spec.rules.is_empty() {
                out.insert(name(0), rule::never());
            }
        }
        Rbac {
            action: action.into(),
            policies: out,
            ..Default::default()
        }
    }
}

/// The same rules, enforced, under names that say why.
fn denied(rules: Rbac) -> Rbac {
    let policies: BTreeMap<String, Policy> = rules
        .policies
        .into_iter()
        .map(|(name, policy)| (format!("{name}-deny-due-to-bad-CUSTOM-action"), policy))
        .collect();
    Rbac { policies, ..rules }
}

/// `ns[NAMESPACE]-policy[NAME]-rule[INDEX]`: what logs and statistics call a rule.
fn policy_name(
    policy: &Object<AuthorizationPolicy>,
    index: usize,
    provider: Option<&str>,
) -> String {
    let prefix = match provider {
        None => String::new(),
        Some("") => format!("{}-", ext_authz::POLICY_PREFIX),
        Some(provider) => format!("{}-{provider}-", ext_authz::POLICY_PREFIX),
    };
    let meta = &policy.meta;
    format!(
        "{prefix}ns[{}]-policy[{}]-rule[{index}]",
        meta.namespace, meta.name
    )
}

fn provider_of(policy: &AuthorizationPolicy) -> &str {
    match &policy.action_detail {
        Some(ActionDetail::Provider(provider)) => &provider.name,
        None => "",
    }
}

fn is_dry_run(policy: &Object<AuthorizationPolicy>) -> bool {
    // The spellings of Go's ParseBool.
    let value = policy.meta.annotations.get(DRY_RUN).map(String::as_str);
    matches!(value, Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
}

/// Objects that select their workloads by labels, or name what they are attached to.
trait Attached {
    fn selector(&self) -> Option<&WorkloadSelector>;
    fn targets(&self) -> Vec<&PolicyTargetReference>;
}

macro_rules! attached {
    ($($kind:ty),*) => { $(
        impl Attached for $kind {
            fn selector(&self) -> Option<&WorkloadSelector> {
                self.selector.as_ref()
            }

            fn targets(&self) -> Vec<&PolicyTargetReference> {
                if self.target_refs.is_empty() {
                    self.target_ref.iter().collect()
                } else {
                    self.target_refs.iter().collect()
                }
            }
        }
    )* };
}
attached!(AuthorizationPolicy, RequestAuthentication);

/// Whether a policy is one of a workload of `namespace` with these labels.
fn is_attached<T: Attached>(object: &Object<T>, (namespace, labels): (&str, &Labels)) -> bool {
    let targets = object.spec.targets();
    if targets.is_empty() {
        let selector = object.spec.selector();
        return selector.is_none_or(|s| labels_match(&s.match_labels, labels));
    }
    let Some(gateway) = labels.get(GATEWAY_NAME) else {
        // It names a gateway, and this is none.
        return false;
    };
    object.meta.namespace == namespace
        && targets.iter().any(|t| {
            (t.group == "gateway.networking.k8s.io" && t.kind == "Gateway" && t.name == *gateway)
                && (t.namespace.is_empty() || t.namespace == namespace)
        })
}

fn by_namespace<T>(mut objects: Vec<Arc<Object<T>>>) -> ByNamespace<T> {
    objects.sort_by(|a, b| a.by_age(b));
    let mut out: ByNamespace<T> = BTreeMap::new();
    for object in objects {
        out.entry(object.meta.namespace.clone())
            .or_default()
            .push(object);
    }
    out
}
