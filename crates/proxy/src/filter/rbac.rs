//! `envoy.filters.http.rbac`: lets requests pass or refuses them, by policy.
//!
//! The client learns only that it may not. Which policy refused it stands in the response code details, in the dynamic
//! metadata and in the statistics.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr, sync::Arc};

use serde_json::{Map, Value};

use super::{Filter, Interests, Step};
use crate::{
    http::{Exchange, LocalReply},
    plan::{
        http_filter::RouteFilterConfig,
        rbac::{Decision, Rbac, Subject},
        route_match::{RequestView, without_query},
    },
    worker::Worker,
};

/// Namespace of the metadata, and name of the filter.
const NAMESPACE: &str = "envoy.filters.http.rbac";
/// Where a LOG rule set tells the access log whether it matched.
const COMMON: &str = "envoy.common";
const LOG_HINT: &str = "access_log_hint";

stats::group! {
    /// `http.<prefix>.rbac.<rules_stat_prefix>`, or `<network prefix>rbac.`
    pub(crate) struct EnforcedStats {
        counter allowed,
        counter denied,
    }
}

stats::group! {
    /// `http.<prefix>.rbac.<shadow_rules_stat_prefix>`, or `<network prefix>rbac.<shadow_rules_stat_prefix>`
    pub(crate) struct ShadowStats {
        counter shadow_allowed,
        counter shadow_denied,
    }
}

/// The statistics of an RBAC filter.
#[derive(Debug)]
pub(crate) struct RbacStats {
    enforced: EnforcedStats,
    shadow: ShadowStats,
}

impl RbacStats {
    /// Below `prefix`, which ends in a dot.
    pub(crate) fn new(prefix: &str, plan: &Rbac, worker: &Worker) -> Self {
        let scope = |own: &str| worker.stats.scope(&format!("{prefix}rbac.{own}"));
        Self {
            enforced: EnforcedStats::new(scope(&plan.rules_stat_prefix)),
            shadow: ShadowStats::new(scope(&plan.shadow_stat_prefix)),
        }
    }

    pub(crate) fn count_shadow(&self, decision: Decision<'_>) {
        match decision.allowed {
            true => self.shadow.shadow_allowed().inc(),
            false => self.shadow.shadow_denied().inc(),
        }
    }

    pub(crate) fn count_enforced(&self, decision: Decision<'_>) {
        match decision.allowed {
            true => self.enforced.allowed().inc(),
            false => self.enforced.denied().inc(),
        }
    }
}

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct RbacFilter {
    plan: Arc<Rbac>,
    stats: RbacStats,
}

impl RbacFilter {
    pub(super) fn new(plan: Arc<Rbac>, prefix: &str, worker: &Worker) -> Self {
        let stats = RbacStats::new(&format!("http.{prefix}."), &plan, worker);
        Self { plan, stats }
    }
}

impl Filter for RbacFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        _: &Worker,
    ) -> Step {
        let plan = match config {
            Some(RouteFilterConfig::Rbac(plan)) => plan,
            _ => &self.plan,
        };
        if let Some(rules) = &plan.shadow_rules {
            let decision = rules.decide(exchange);
            self.stats.count_shadow(decision);
            // Metadata is what shadow rules are for: `ext_authz`, logs and spans read it.
            let prefix = &plan.shadow_stat_prefix;
            note(
                &mut exchange.dynamic_metadata,
                NAMESPACE,
                prefix,
                "shadow",
                decision,
            );
        }
        let Some(rules) = &plan.rules else {
            return Step::Continue;
        };
        let decision = rules.decide(exchange);
        if let Some(logged) = decision.logged {
            hint(&mut exchange.dynamic_metadata, logged);
        }
        if rules.only_logs() {
            return Step::Continue;
        }
        self.stats.count_enforced(decision);
        if decision.allowed {
            return Step::Continue;
        }
        let prefix = &plan.rules_stat_prefix;
        note(
            &mut exchange.dynamic_metadata,
            NAMESPACE,
            prefix,
            "enforced",
            decision,
        );
        Step::Reply(LocalReply::new(
            403,
            "RBAC: access denied",
            details(decision),
        ))
    }
}

/// `%RESPONSE_CODE_DETAILS%` and `%CONNECTION_TERMINATION_DETAILS%` of a refusal.
pub(crate) fn details(decision: Decision<'_>) -> Cow<'static, str> {
    match decision.policy {
        // Logs are split at blanks.
        Some(name) => {
            let name = name.replace(|c: char| c.is_ascii_whitespace(), "_");
            Cow::Owned(format!("rbac_access_denied_matched_policy[{name}]"))
        }
        None => Cow::Borrowed("rbac_access_denied_matched_policy[none]"),
    }
}

/// Writes a decision into the metadata under the filter's name.
pub(crate) fn note(
    metadata: &mut BTreeMap<String, Value>,
    filter: &str,
    prefix: &str,
    kind: &str,
    decision: Decision<'_>,
) {
    let notes = namespace(metadata, filter);
    if let Some(policy) = decision.policy {
        notes.insert(
            format!("{prefix}{kind}_effective_policy_id"),
            Value::from(&**policy),
        );
    }
    let result = if decision.allowed {
        "allowed"
    } else {
        "denied"
    };
    notes.insert(format!("{prefix}{kind}_engine_result"), Value::from(result));
}

fn hint(metadata: &mut BTreeMap<String, Value>, matched: bool) {
    namespace(metadata, COMMON).insert(LOG_HINT.to_owned(), Value::from(matched));
}

fn namespace<'m>(
    metadata: &'m mut BTreeMap<String, Value>,
    name: &str,
) -> &'m mut Map<String, Value> {
    let value = metadata
        .entry(name.to_owned())
        .or_insert_with(|| Value::Object(Map::new()));
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

impl Subject for Exchange<'_> {
    fn direct_remote(&self) -> Option<IpAddr> {
        self.connection.direct_remote.map(|a| a.ip())
    }

    fn remote(&self) -> Option<IpAddr> {
        self.client
    }

    fn names(&self) -> Option<impl Iterator<Item = &str>> {
        self.connection.peer_names()
    }

    fn bare_path(&self) -> Cow<'_, [u8]> {
        match self.route.configuration() {
            Some(routes) => routes.path_of(self),
            None => without_query(RequestView::path(self)).into(),
        }
    }
}
