//! What the API server asks of fields beyond their types: the limits and the rules between fields (CEL) that Istio's own
//! definitions have, so that an object is taken here exactly where it is taken there.

use serde_json::{Map, Value, json};

use super::limits::{BETWEEN, DURATION, FIELDS, REQUIRED};

/// A limit on what a field, or an element of it, may hold.
#[derive(Clone, Copy)]
pub(super) enum Limit {
    /// Characters of a text, at least and at most; 0 says nothing.
    Length(u32, u32),
    /// The regular expression that a text matches.
    Matches(&'static str),
    /// Elements of a list, at least and at most; 0 says nothing.
    Items(u32, u32),
    /// Entries of a map, at least and at most; 0 says nothing.
    Entries(u32, u32),
    /// A number's least value.
    From(u32),
    /// A number's greatest value.
    To(u32),
    /// The field whose value tells the elements of a list apart.
    Keyed(&'static str),
    /// A rule and what is said when it does not hold.
    Rule(&'static str, &'static str),
    /// The same, in place of the rules that the field's message has of its own.
    Instead(&'static str, &'static str),
}

/// Fields that must be there, by message.
pub(super) fn required(message: &str) -> &'static [&'static str] {
    lookup(REQUIRED, message)
}

/// Adds the rules between the fields of a message to its schema.
pub(super) fn between_fields(message: &str, schema: &mut Map<String, Value>) {
    apply(lookup(BETWEEN, message), schema);
}

/// Adds the limits of a field, named as in [`FIELDS`].
pub(super) fn of_field(message: &str, field: &str, schema: &mut Map<String, Value>) {
    let message = message.strip_prefix("istio.");
    let found = FIELDS
        .iter()
        .find(|(m, f, _)| *f == field && Some(*m) == message);
    if let Some((_, _, limits)) = found {
        apply(limits, schema);
    }
}

/// Names beside that of JSON under which a field is taken, for fields that users write that way.
pub(super) fn alias(message: &str, field: &str) -> Option<&'static str> {
    match (message, field) {
        ("istio.networking.v1alpha3.HTTPRoute", "mirrorPercent") => Some("mirror_percent"),
        ("istio.security.v1beta1.JWTRule", "jwksUri") => Some("jwks_uri"),
        _ => None,
    }
}

/// What all durations must be but those that may be none.
pub(super) fn of_duration(message: &str, field: &str, schema: &mut Map<String, Value>) {
    let free = [
        ("ConnectionPoolSettings.TCPSettings", "idleTimeout"),
        ("LoadBalancerSettings.ConsistentHashLB.HTTPCookie", "ttl"),
        ("TrafficPolicy.RetryBudget", "budgetInterval"),
    ];
    let name = message.strip_prefix("istio.networking.v1alpha3.");
    if !free.iter().any(|(m, f)| name == Some(*m) && field == *f) {
        apply(&[DURATION], schema);
    }
}

fn lookup<T>(table: &[(&'static str, &'static [T])], message: &str) -> &'static [T] {
    let name = message.strip_prefix("istio.");
    let found = table.iter().find(|(m, _)| Some(*m) == name);
    found.map_or(&[], |(_, found)| found)
}

fn apply(limits: &[Limit], schema: &mut Map<String, Value>) {
    let mut rules = Vec::new();
    use Limit::*;
    for limit in limits {
        let (least, most) = match *limit {
            Length(..) => ("minLength", "maxLength"),
            Items(..) => ("minItems", "maxItems"),
            _ => ("minProperties", "maxProperties"),
        };
        match *limit {
            Length(from, to) | Items(from, to) | Entries(from, to) => {
                for (name, value) in [(least, from), (most, to)] {
                    if value > 0 {
                        schema.insert(name.to_owned(), value.into());
                    }
                }
            }
            Matches(pattern) => drop(schema.insert("pattern".to_owned(), pattern.into())),
            From(least) => drop(schema.insert("minimum".to_owned(), least.into())),
            To(most) => drop(schema.insert("maximum".to_owned(), most.into())),
            Keyed(field) => {
                schema.insert("x-kubernetes-list-type".to_owned(), "map".into());
                schema.insert("x-kubernetes-list-map-keys".to_owned(), json!([field]));
            }
            Rule(rule, message) => rules.push(json!({"rule": rule, "message": message})),
            Instead(rule, message) => {
                schema.remove("x-kubernetes-validations");
                rules.push(json!({"rule": rule, "message": message}));
            }
        }
    }
    if !rules.is_empty() {
        schema.insert("x-kubernetes-validations".to_owned(), rules.into());
    }
}
