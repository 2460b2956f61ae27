//! Role-based access control, for requests and for connections.

use std::sync::Arc;

use proto::{
    envoy::{
        config::rbac::v3 as pb,
        extensions::{
            filters::{http::rbac::v3 as http_pb, network::rbac::v3 as network_pb},
            path::r#match::uri_template::v3::UriTemplateMatchConfig,
        },
        r#type::matcher::v3::{PathMatcher, filter_state_matcher, path_matcher},
    },
    xds::r#type::matcher::v3::Matcher as Tree,
};

use super::{
    common::{
        cidr, enumeration, extension, header_matcher, metadata_matcher, positive, string_matcher,
    },
    matcher_tree::matcher,
};
use crate::plan::{
    error::{At, Step, unsupported},
    matcher::StringMatcher,
    matcher_tree::Input,
    rbac::{Action, Engine, Permission, Policy, Principal, Rbac, Rules, Verdict},
    uri_template::UriTemplate,
};

/// `envoy.extensions.filters.http.rbac.v3.RBAC`.
pub(super) fn http_rbac(at: At<'_>, m: &http_pb::Rbac) -> Step<Rbac> {
    let http_pb::Rbac {
        rules,
        rules_stat_prefix,
        matcher: tree,
        shadow_rules,
        shadow_matcher,
        shadow_rules_stat_prefix,
        track_per_rule_stats,
    } = m;
    Ok(Rbac {
        rules: engine(at, ["rules", "matcher"], rules, tree)?,
        shadow_rules: engine(
            at,
            ["shadow_rules", "shadow_matcher"],
            shadow_rules,
            shadow_matcher,
        )?,
        rules_stat_prefix: rules_stat_prefix.as_str().into(),
        shadow_stat_prefix: shadow_rules_stat_prefix.as_str().into(),
        per_rule_stats: *track_per_rule_stats,
        delay_deny: None,
    })
}

/// `envoy.extensions.filters.http.rbac.v3.RBACPerRoute`; `None` switches the filter off.
pub(super) fn http_rbac_per_route(at: At<'_>, m: &http_pb::RbacPerRoute) -> Step<Option<Rbac>> {
    at.optional("rbac", &m.rbac, http_rbac)
}

/// `envoy.extensions.filters.network.rbac.v3.RBAC`, and the prefix of its statistics.
pub(super) fn network_rbac(at: At<'_>, m: &network_pb::Rbac) -> Step<(Arc<str>, Rbac)> {
    let network_pb::Rbac {
        rules,
        matcher: tree,
        shadow_rules,
        shadow_matcher,
        shadow_rules_stat_prefix,
        stat_prefix,
        enforcement_type,
        delay_deny,
    } = m;
    for (field, rules) in [("rules", rules), ("shadow_rules", shadow_rules)] {
        for (name, policy) in rules.iter().flat_map(|rules| &rules.policies) {
            // As in Envoy: such a policy would never match, which nobody means.
            if policy.permissions.iter().any(asks_permission_for_header)
                || policy.principals.iter().any(asks_principal_for_header)
            {
                let at = at.field(field);
                let at = at.field("policies");
                let at = at.key(name);
                return Err(at.error("`header` is for requests; a connection has none"));
            }
        }
    }
    // CONTINUOUS asks again with each piece of data, for policies on what other filters learn from the data. There are no
    // such filters here, so that the answer would be the first one each time.
    enumeration::<network_pb::rbac::EnforcementType>(&at, "enforcement_type", *enforcement_type)?;
    let fields = [["rules", "matcher"], ["shadow_rules", "shadow_matcher"]];
    let engines = [
        engine(at, fields[0], rules, tree)?,
        engine(at, fields[1], shadow_rules, shadow_matcher)?,
    ];
    let of_requests = |input: &Input| matches!(input, Input::Header(_) | Input::QueryParameter(_));
    for (engine, [_, field]) in engines.iter().zip(fields) {
        if matches!(engine, Some(Engine::Matcher { tree, .. }) if tree.asks(&of_requests)) {
            return Err(at.field(field).error(
                "inputs of requests (headers, query parameters) do not exist for connections",
            ));
        }
    }
    let [rules, shadow_rules] = engines;
    let plan = Rbac {
        rules,
        shadow_rules,
        shadow_stat_prefix: shadow_rules_stat_prefix.as_str().into(),
        delay_deny: positive(&at, "delay_deny", delay_deny)?,
        ..Rbac::default()
    };
    Ok((at.text("stat_prefix", stat_prefix)?, plan))
}

/// Policies, or the matcher form of them.
fn engine(
    at: At<'_>,
    [rules_field, tree_field]: [&str; 2],
    rules: &Option<pb::Rbac>,
    tree: &Option<Tree>,
) -> Step<Option<Engine>> {
    let Some(tree) = tree else {
        let rules = at.optional(rules_field, rules, self::rules)?;
        return Ok(rules.map(Engine::Rules));
    };
    let at_tree = at.field(tree_field);
    if rules.is_some() {
        // Envoy warns, and forgets the rules.
        return Err(at_tree.error(format!("stands beside `{rules_field}`: remove one of them")));
    }
    let mut logs = false;
    let tree = matcher(at_tree, tree, &mut |at, found| {
        if found.name != "envoy.config.rbac.v3.Action" {
            return Err(found.unknown(&at, "action of RBAC"));
        }
        let m: pb::Action = found.decode(&at)?;
        let action = action(&at, m.action)?;
        logs |= action == Action::Log;
        Ok(Verdict {
            name: at.text("name", &m.name)?,
            action,
        })
    })?;
    Ok(Some(Engine::Matcher { tree, logs }))
}

fn action(at: &At<'_>, value: i32) -> Step<Action> {
    Ok(match enumeration(at, "action", value)? {
        pb::rbac::Action::Allow => Action::Allow,
        pb::rbac::Action::Deny => Action::Deny,
        pb::rbac::Action::Log => Action::Log,
    })
}

fn asks_permission_for_header(m: &pb::Permission) -> bool {
    use pb::permission::Rule as R;
    match &m.rule {
        Some(R::Header(_)) => true,
        Some(R::AndRules(set) | R::OrRules(set)) => {
            set.rules.iter().any(asks_permission_for_header)
        }
        Some(R::NotRule(not)) => asks_permission_for_header(not),
        _ => false,
    }
}

fn asks_principal_for_header(m: &pb::Principal) -> bool {
    use pb::principal::Identifier as I;
    match &m.identifier {
        Some(I::Header(_)) => true,
        Some(I::AndIds(set) | I::OrIds(set)) => set.ids.iter().any(asks_principal_for_header),
        Some(I::NotId(not)) => asks_principal_for_header(not),
        _ => false,
    }
}

fn rules(at: At<'_>, m: &pb::Rbac) -> Step<Rules> {
    let pb::Rbac {
        action,
        policies,
        audit_logging_options,
    } = m;
    unsupported!(at, audit_logging_options);
    let action = self::action(&at, *action)?;
    let at = at.field("policies");
    let policies: Step<Vec<_>> = policies
        .iter()
        .map(|(name, m)| Ok((name.as_str().into(), policy(at.key(name), m)?)))
        .collect();
    Ok(Rules::new(action, policies?))
}

fn policy(at: At<'_>, m: &pb::Policy) -> Step<Policy> {
    let pb::Policy {
        permissions,
        principals,
        condition,
        checked_condition,
        cel_config: _,
    } = m;
    unsupported!(at, condition, checked_condition);
    if permissions.is_empty() || principals.is_empty() {
        return Err(at.error("needs permissions and principals; `any: true` stands for all"));
    }
    Ok(Policy {
        permissions: all(&at, "permissions", permissions, permission)?,
        principals: all(&at, "principals", principals, principal)?,
    })
}

/// All or nothing: a rule that lost a part of itself would be another rule.
fn all<M, T>(
    at: &At<'_>,
    name: &str,
    messages: &[M],
    mut convert: impl FnMut(At<'_>, &M) -> Step<T>,
) -> Step<Vec<T>> {
    let at = at.field(name);
    let each = messages.iter().enumerate();
    each.map(|(index, m)| convert(at.index(index), m)).collect()
}

#[allow(deprecated)] // `metadata` is what control planes send.
fn permission(at: At<'_>, m: &pb::Permission) -> Step<Permission> {
    use pb::permission::Rule as R;
    Ok(match &m.rule {
        Some(R::AndRules(set)) => Permission::All(all(
            &at.field("and_rules"),
            "rules",
            &set.rules,
            permission,
        )?),
        Some(R::OrRules(set)) => {
            Permission::Any(all(&at.field("or_rules"), "rules", &set.rules, permission)?)
        }
        Some(R::NotRule(not)) => Permission::Not(Box::new(permission(at.field("not_rule"), not)?)),
        Some(R::Any(any)) => only_true(&at, *any, Permission::Anything)?,
        Some(R::Header(m)) => Permission::Header(header_matcher(at.field("header"), m)?),
        Some(R::UrlPath(m)) => Permission::Path(path(at.field("url_path"), m)?),
        Some(R::UriTemplate(m)) => {
            let at = at.field("uri_template");
            let any = m.typed_config.as_ref();
            let any = any.ok_or_else(|| at.field("typed_config").error("is required"))?;
            let found = extension(&at, any)?;
            if found.name != "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig" {
                return Err(found.unknown(&at, "path matcher"));
            }
            let m: UriTemplateMatchConfig = found.decode(&at)?;
            let template = UriTemplate::parse(&m.path_template)
                .map_err(|error| at.field("path_template").error(error))?;
            Permission::PathTemplate(template)
        }
        Some(R::DestinationIp(m)) => {
            Permission::DestinationIp(cidr(at.field("destination_ip"), m)?)
        }
        Some(R::DestinationPort(port)) => {
            let port = port_number(&at.field("destination_port"), i64::from(*port))?;
            Permission::DestinationPort(port, port)
        }
        Some(R::DestinationPortRange(range)) => {
            let at = at.field("destination_port_range");
            let first = port_number(&at.field("start"), i64::from(range.start))?;
            // The end of Envoy's ranges does not belong to them.
            let last = port_number(&at.field("end"), i64::from(range.end) - 1)?;
            Permission::DestinationPort(first, last)
        }
        Some(R::Metadata(m)) => Permission::Metadata(metadata_matcher(at.field("metadata"), m)?),
        Some(R::SourcedMetadata(m)) => {
            Permission::Metadata(sourced(at.field("sourced_metadata"), m)?)
        }
        Some(R::RequestedServerName(m)) => {
            Permission::ServerName(string_matcher(at.field("requested_server_name"), m)?)
        }
        Some(R::Matcher(_)) => {
            return Err(at.field("matcher").not_implemented("is not implemented"));
        }
        None => return Err(at.error("needs a rule; `any: true` stands for all")),
    })
}

#[allow(deprecated)] // `metadata` and `source_ip` are what control planes send.
fn principal(at: At<'_>, m: &pb::Principal) -> Step<Principal> {
    use pb::principal::Identifier as I;
    let not_implemented = |name: &str| Err(at.field(name).not_implemented("is not implemented"));
    Ok(match &m.identifier {
        Some(I::AndIds(set)) => {
            Principal::All(all(&at.field("and_ids"), "ids", &set.ids, principal)?)
        }
        Some(I::OrIds(set)) => {
            Principal::Any(all(&at.field("or_ids"), "ids", &set.ids, principal)?)
        }
        Some(I::NotId(not)) => Principal::Not(Box::new(principal(at.field("not_id"), not)?)),
        Some(I::Any(any)) => only_true(&at, *any, Principal::Anybody)?,
        Some(I::Authenticated(m)) => {
            let at = at.field("authenticated");
            Principal::Authenticated(at.optional(
                "principal_name",
                &m.principal_name,
                string_matcher,
            )?)
        }
        Some(I::SourceIp(m)) => Principal::SourceIp(cidr(at.field("source_ip"), m)?),
        Some(I::DirectRemoteIp(m)) => {
            Principal::DirectRemoteIp(cidr(at.field("direct_remote_ip"), m)?)
        }
        Some(I::RemoteIp(m)) => Principal::RemoteIp(cidr(at.field("remote_ip"), m)?),
        Some(I::Header(m)) => Principal::Header(header_matcher(at.field("header"), m)?),
        Some(I::UrlPath(m)) => Principal::Path(path(at.field("url_path"), m)?),
        Some(I::Metadata(m)) => Principal::Metadata(metadata_matcher(at.field("metadata"), m)?),
        Some(I::SourcedMetadata(m)) => {
            Principal::Metadata(sourced(at.field("sourced_metadata"), m)?)
        }
        Some(I::FilterState(m)) => {
            let at = at.field("filter_state");
            let key = at.text("key", &m.key)?;
            match &m.matcher {
                Some(filter_state_matcher::Matcher::StringMatch(m)) => {
                    Principal::FilterState(key, string_matcher(at.field("string_match"), m)?)
                }
                _ => return Err(at.not_implemented("only string_match is implemented")),
            }
        }
        Some(I::Custom(_)) => return not_implemented("custom"),
        None => return Err(at.error("needs an identifier; `any: true` stands for all")),
    })
}

fn sourced(at: At<'_>, m: &pb::SourcedMetadata) -> Step<crate::plan::matcher::MetadataMatcher> {
    let source: pb::MetadataSource = enumeration(&at, "metadata_source", m.metadata_source)?;
    if source != pb::MetadataSource::Dynamic {
        return Err(at
            .field("metadata_source")
            .not_implemented("only DYNAMIC is implemented"));
    }
    at.required("metadata_matcher", &m.metadata_matcher, metadata_matcher)
}

fn path(at: At<'_>, m: &PathMatcher) -> Step<StringMatcher> {
    match &m.rule {
        Some(path_matcher::Rule::Path(m)) => string_matcher(at.field("path"), m),
        None => Err(at.field("path").error("is required")),
    }
}

fn only_true<T>(at: &At<'_>, any: bool, all: T) -> Step<T> {
    if any {
        return Ok(all);
    }
    Err(at
        .field("any")
        .error("must be true; use not_rule or not_id for the opposite"))
}

fn port_number(at: &At<'_>, number: i64) -> Step<u16> {
    u16::try_from(number).map_err(|_| at.error(format!("{number} is not a port")))
}
