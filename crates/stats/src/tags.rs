//! Tags: the variable parts of a name, as Envoy's tag extraction finds them.

use std::sync::Arc;

use regex::Regex;

/// A name without its variable parts, and those parts as labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tagged {
    pub(crate) name: Arc<str>,
    pub(crate) tags: Arc<[(Arc<str>, Arc<str>)]>,
}

impl Tagged {
    pub(crate) fn new(name: &str, tags: &[(&str, &str)]) -> Self {
        Self {
            name: name.into(),
            tags: tags
                .iter()
                .map(|&(tag, value)| (tag.into(), value.into()))
                .collect(),
        }
    }
}

/// How tags are taken out of names (`stats_config.stats_tags`).
#[derive(Clone, Debug)]
pub struct TagRules {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    tag: Arc<str>,
    how: How,
}

#[derive(Clone, Debug)]
enum How {
    /// The first group is cut out of the name, the second (else the first) is the value.
    Regex(Regex),
    /// The same, of an expression that looks ahead: these rules are in the language of ECMAScript, and Istio's bootstrap
    /// has one. It is only run when a stat comes into being, on a name that is short.
    Looking(fancy_regex::Regex),
    /// The same value on each stat.
    Fixed(Arc<str>),
}

/// A tag rule that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagError {
    /// The tag.
    pub tag: String,
    /// What is wrong with its expression.
    pub reason: String,
}

impl std::fmt::Display for TagError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stats tag {}: {}", self.tag, self.reason)
    }
}

impl std::error::Error for TagError {}

impl Default for TagRules {
    /// Envoy's own rules.
    fn default() -> Self {
        let mut rules = Self::none();
        for (tag, expression) in DEFAULTS {
            rules
                .regex(tag, expression)
                .expect("the expressions in this file are tested");
        }
        rules
    }
}

impl TagRules {
    /// No rule at all (`use_all_default_tags: false`).
    pub fn none() -> Self {
        Self { rules: Vec::new() }
    }

    /// The expression of one of Envoy's own rules, for a `stats_tags` entry that gives only the tag's name.
    pub fn default_expression(tag: &str) -> Option<&'static str> {
        DEFAULTS
            .iter()
            .find(|(name, _)| *name == tag)
            .map(|(_, expression)| *expression)
    }

    /// Adds a rule by expression; a rule for the same tag is replaced. The first group is cut out of the name, the second
    /// group, or the first where there is no second, is the value.
    pub fn regex(&mut self, tag: &str, expression: &str) -> Result<(), TagError> {
        let error = |reason: String| TagError {
            tag: tag.to_owned(),
            reason,
        };
        let (how, groups) = match Regex::new(expression) {
            Ok(regex) => {
                let groups = regex.captures_len();
                (How::Regex(regex), groups)
            }
            // What the plain kind has no word for may be one that looks around; its error says more about a mistake.
            Err(reason) => match fancy_regex::Regex::new(expression) {
                Ok(regex) => {
                    let groups = regex.captures_len();
                    (How::Looking(regex), groups)
                }
                Err(_) => return Err(error(reason.to_string())),
            },
        };
        if groups < 2 {
            return Err(error(format!(
                "`{expression}` has no group, so there is nothing to take out"
            )));
        }
        self.put(tag, how);
        Ok(())
    }

    /// Adds a label that every stat has.
    pub fn fixed(&mut self, tag: &str, value: &str) {
        self.put(tag, How::Fixed(value.into()));
    }

    fn put(&mut self, tag: &str, how: How) {
        self.rules.retain(|rule| &*rule.tag != tag);
        self.rules.push(Rule {
            tag: tag.into(),
            how,
        });
    }

    pub(crate) fn extract(&self, name: &str) -> Tagged {
        let mut tags = Vec::new();
        let mut cuts: Vec<(usize, usize)> = Vec::new();
        for rule in &self.rules {
            let found = match &rule.how {
                How::Fixed(value) => {
                    tags.push((rule.tag.clone(), value.clone()));
                    continue;
                }
                How::Regex(regex) => regex.captures(name).and_then(|groups| {
                    let cut = groups.get(1)?;
                    Some((cut.range(), groups.get(2).unwrap_or(cut).range()))
                }),
                // One that takes too many steps has found nothing.
                How::Looking(regex) => regex.captures(name).ok().flatten().and_then(|groups| {
                    let cut = groups.get(1)?;
                    Some((cut.range(), groups.get(2).unwrap_or(cut).range()))
                }),
            };
            if let Some((cut, value)) = found {
                cuts.push((cut.start, cut.end));
                tags.push((rule.tag.clone(), name[value].into()));
            }
        }
        // Expressions look at the whole name, so what they cut may overlap.
        cuts.sort_unstable();
        let mut rest = String::with_capacity(name.len());
        let mut at = 0;
        for (start, end) in cuts {
            if start > at {
                rest.push_str(&name[at..start]);
            }
            at = at.max(end);
        }
        rest.push_str(&name[at..]);
        Tagged {
            name: rest.into(),
            tags: tags.into(),
        }
    }
}

/// Envoy's default rules, as far as stats of these names exist.
const DEFAULTS: &[(&str, &str)] = &[
    ("envoy.response_code", r"_rq(_(\d{3}))$"),
    ("envoy.response_code_class", r"_rq_((\d))xx$"),
    ("envoy.cluster_name", r"^cluster\.((.*?)\.)"),
    (
        "envoy.listener_address",
        r"^listener\.(((?:[_.[:digit:]]*|[_\[\]aAbBcCdDeEfF[:digit:]]*))\.)",
    ),
    (
        "envoy.http_conn_manager_prefix",
        r"^(?:|listener(?:|\..*?)\.)http\.((.*?)\.)",
    ),
    ("envoy.tcp_prefix", r"^tcp\.((.*?)\.)\w+?$"),
    ("envoy.virtual_host", r"^vhost\.((.*?)\.)"),
    (
        "envoy.virtual_cluster",
        r"^vhost\.(?:.*?)\.vcluster\.((.*?)\.)",
    ),
    ("envoy.route", r"^vhost\.(?:.*?)\.route\.((.*?)\.)"),
    (
        "envoy.fault_downstream_cluster",
        r"^http(?:\..*?)?\.fault\.((.*?)\.)\w+?$",
    ),
    (
        "envoy.grpc_bridge_service",
        r"^cluster(?:\..*?)\.grpc\.((.*)\.)[^.]+\.(?:success|failure|total|\w*_count|\d+|upstream_rq_time)$",
    ),
    (
        "envoy.grpc_bridge_method",
        r"^cluster(?:\..*?)\.grpc\.(?:.*\.)?(([^.]+)\.)(?:success|failure|total|\w*_count|\d+|upstream_rq_time)$",
    ),
    ("envoy.ssl_version", r"\.ssl\.versions(\.(.*?))$"),
    ("envoy.ssl_cipher", r"\.ssl\.ciphers(\.(.*?))$"),
    ("envoy.ssl_curve", r"\.ssl\.curves(\.(.*?))$"),
    ("envoy.ssl_sigalg", r"\.ssl\.sigalgs(\.(.*?))$"),
    (
        "envoy.rds_route_config",
        r"^http\.(?:.*?)\.rds\.((.*?)\.)\w+?$",
    ),
    ("envoy.worker_id", r"\.worker_((\d+)\.)"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn extract(rules: &TagRules, name: &str) -> (String, Vec<(String, String)>) {
        let tagged = rules.extract(name);
        (
            tagged.name.to_string(),
            tagged
                .tags
                .iter()
                .map(|(a, b)| (a.to_string(), b.to_string()))
                .collect(),
        )
    }

    fn tag(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn envoys_names_give_envoys_tags() {
        let rules = TagRules::default();
        for (name, rest, tags) in [
            (
                "cluster.a.upstream_cx_total",
                "cluster.upstream_cx_total",
                vec![tag("envoy.cluster_name", "a")],
            ),
            (
                "cluster.a.upstream_rq_503",
                "cluster.upstream_rq",
                vec![
                    tag("envoy.response_code", "503"),
                    tag("envoy.cluster_name", "a"),
                ],
            ),
            (
                "http.ingress_http.downstream_rq_2xx",
                "http.downstream_rq_xx",
                vec![
                    tag("envoy.response_code_class", "2"),
                    tag("envoy.http_conn_manager_prefix", "ingress_http"),
                ],
            ),
            (
                "listener.0.0.0.0_8080.downstream_cx_total",
                "listener.downstream_cx_total",
                vec![tag("envoy.listener_address", "0.0.0.0_8080")],
            ),
            ("server.live", "server.live", vec![]),
        ] {
            assert_eq!(extract(&rules, name), (rest.to_owned(), tags), "{name}");
        }
    }

    #[test]
    fn a_users_rule_replaces_the_default_of_its_name() {
        let mut rules = TagRules::default();
        rules
            .regex("envoy.cluster_name", r"^cluster\.((.+?);\.?)")
            .expect("it is valid");
        rules.fixed("pod", "p1");
        let (rest, tags) = extract(
            &rules,
            "cluster.outbound|80||a.b.svc.cluster.local;.upstream_cx_total",
        );
        assert_eq!(rest, "cluster.upstream_cx_total");
        assert!(tags.contains(&tag(
            "envoy.cluster_name",
            "outbound|80||a.b.svc.cluster.local"
        )));
        assert!(tags.contains(&tag("pod", "p1")));
    }

    #[test]
    fn an_expression_may_look_ahead() {
        let mut rules = TagRules::none();
        rules
            .regex(
                "http_conn_manager_listener_prefix",
                r"^listener(?=\.).*?\.http\.(((?:[_.[:digit:]]*|[_\[\]aAbBcCdDeEfF[:digit:]]*))\.)",
            )
            .expect("Istio's bootstrap has it");
        assert_eq!(
            extract(
                &rules,
                "listener.0.0.0.0_15006.http.0.0.0.0_80.downstream_rq_2xx"
            ),
            (
                "listener.0.0.0.0_15006.http.downstream_rq_2xx".to_owned(),
                vec![tag("http_conn_manager_listener_prefix", "0.0.0.0_80")]
            )
        );
        let other = "listeners.0.0.0.0_15006.http.0.0.0.0_80.downstream_rq_2xx";
        assert_eq!(extract(&rules, other), (other.to_owned(), vec![]));
        let error = rules.regex("x", "((a").expect_err("it is none");
        assert!(error.reason.contains("unclosed group"), "{error}");
    }

    #[test]
    fn a_rule_without_a_group_is_refused() {
        let error = TagRules::none()
            .regex("x", "^a$")
            .expect_err("it has no group");
        assert_eq!(error.tag, "x");
    }
}
