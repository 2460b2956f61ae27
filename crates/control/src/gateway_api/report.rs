//! What is said of each object: conditions in the words of Gateway API.

use config::gateway_api::ParentReference;

/// Why something is not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// One of the specification's reasons.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Fault {
    pub(super) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Fault {
            reason,
            message: message.into(),
        }
    }

    /// Both, the first one's reason.
    pub(super) fn join(first: Option<Fault>, second: Option<Fault>) -> Option<Fault> {
        match (first, second) {
            (Some(mut a), Some(b)) => {
                a.message = format!("{}; {}", a.message, b.message);
                Some(a)
            }
            (a, b) => a.or(b),
        }
    }
}

/// One condition, but for its times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// e.g. `Accepted`.
    pub kind: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// e.g. `NoMatchingParent`.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Condition {
    /// A condition that holds unless there is a fault.
    pub fn unless(
        kind: &'static str,
        fault: Option<&Fault>,
        reason: &str,
        message: impl Into<String>,
    ) -> Self {
        match fault {
            None => Condition {
                kind,
                holds: true,
                reason: reason.to_owned(),
                message: message.into(),
            },
            Some(fault) => Condition {
                kind,
                holds: false,
                reason: fault.reason.to_owned(),
                message: fault.message.clone(),
            },
        }
    }
}

/// What is said of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// A GatewayClass of ours.
    Class,
    /// A Gateway or ListenerSet of a class of ours.
    Gateway(GatewayReport),
    /// A route, by parents that are ours.
    Route(Vec<ParentReport>),
    /// A policy, by what it applies to.
    Policy(Vec<AncestorReport>),
}

/// What is said of a Gateway (or ListenerSet) before anybody looks for its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayReport {
    /// Whether it is a ListenerSet.
    pub is_set: bool,
    /// Why it is not accepted as a whole.
    pub fault: Option<Fault>,
    /// Why it is not taken at all: nothing else is said.
    pub refused: Option<Fault>,
    /// Host names of the services that it listens at.
    pub services: Vec<String>,
    /// The namespace of those services.
    pub namespace: String,
    /// The ports that it listens at.
    pub ports: Vec<u32>,
    /// Whether we make its Deployment.
    pub managed: bool,
    /// In the order of `spec`.
    pub listeners: Vec<ListenerReport>,
    /// How many ListenerSets add to it.
    pub sets: usize,
    /// Whether clients without a valid certificate are let in somewhere.
    pub insecure_frontend: bool,
    /// The addresses that the user asks to be told, if not the usual ones: `IPAddress` or `Hostname`.
    pub address_type: Option<String>,
}

/// What is said of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerReport {
    /// Its name.
    pub name: String,
    /// Kinds of routes that may attach.
    pub kinds: Vec<&'static str>,
    /// How many routes are attached.
    pub attached: usize,
    /// Accepted, Conflicted, Programmed, ResolvedRefs.
    pub conditions: Vec<Condition>,
    /// Whether it is served.
    pub valid: bool,
}

/// What is said of a route towards one parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentReport {
    /// As the route names it.
    pub parent: ParentReference,
    /// How many listeners it is attached to.
    pub bound: usize,
    /// Why it is not attached.
    pub denied: Option<Fault>,
    /// What of its rules cannot be followed.
    pub unresolved: Option<Fault>,
}

/// What is said of a policy towards one thing that it applies to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AncestorReport {
    /// The thing.
    pub ancestor: ParentReference,
    /// Who says so.
    pub controller: &'static str,
    /// Why it does not apply.
    pub denied: Option<Fault>,
    /// What of its references cannot be followed.
    pub unresolved: Option<Fault>,
}

impl Report {
    /// All that is wrong, each with the field that it is about.
    pub fn faults(&self) -> Vec<(String, Fault)> {
        match self {
            Report::Class => Vec::new(),
            Report::Gateway(gateway) => {
                let whole = gateway.fault.iter().chain(&gateway.refused);
                let mut out: Vec<(String, Fault)> =
                    whole.map(|f| (String::new(), f.clone())).collect();
                for (i, listener) in gateway.listeners.iter().enumerate() {
                    let mut said: Vec<&str> = Vec::new();
                    for c in &listener.conditions {
                        let bad = c.holds == (c.kind == "Conflicted");
                        if bad && !said.contains(&c.message.as_str()) {
                            said.push(&c.message);
                            out.push((
                                format!("spec.listeners[{i}]"),
                                Fault::new(reason(&c.reason), c.message.clone()),
                            ));
                        }
                    }
                }
                out
            }
            Report::Route(parents) => {
                let mut out = Vec::new();
                for parent in parents {
                    let field = format!("spec.parentRefs[name={}]", parent.parent.name);
                    out.extend(parent.denied.iter().map(|f| (field.clone(), f.clone())));
                    let known = |f: &&Fault| !out.iter().any(|(_, o): &(String, Fault)| o == *f);
                    let unresolved: Vec<_> = parent.unresolved.iter().filter(known).collect();
                    let unresolved: Vec<_> = unresolved
                        .into_iter()
                        .map(|f| ("spec.rules".to_owned(), f.clone()))
                        .collect();
                    out.extend(unresolved);
                }
                out
            }
            Report::Policy(ancestors) => {
                let mut out: Vec<(String, Fault)> = Vec::new();
                for ancestor in ancestors {
                    for fault in ancestor.denied.iter().chain(&ancestor.unresolved) {
                        if !out.iter().any(|(_, o)| o == fault) {
                            out.push((String::new(), fault.clone()));
                        }
                    }
                }
                out
            }
        }
    }
}

/// Reasons of listeners are few: the text outlives the report that it was read from.
fn reason(text: &str) -> &'static str {
    const KNOWN: [&str; 10] = [
        "Invalid",
        "InvalidCertificateRef",
        "InvalidCACertificateRef",
        "InvalidCACertificateKind",
        "NoValidCACertificate",
        "InvalidRouteKinds",
        "RefNotPermitted",
        "UnsupportedProtocol",
        "HostnameConflict",
        "ProtocolConflict",
    ];
    KNOWN.into_iter().find(|k| *k == text).unwrap_or("Invalid")
}
