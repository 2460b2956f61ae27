//! GatewayClass, Gateway and ListenerSet.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{ObjectReference, route::ParentReference};
use crate::object::null_as_default;

/// `spec` of a GatewayClass.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GatewayClass {
    /// Who looks after Gateways of the class: `istio.io/gateway-controller` for us.
    pub controller_name: String,
    /// For people.
    pub description: Option<String>,
    /// Settings of the whole class; not acted upon.
    pub parameters_ref: Option<ParametersReference>,
}

/// A reference to settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ParametersReference {
    /// Group of the object; empty for the core group.
    pub group: String,
    /// Kind of the object.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its namespace, where the referrer has none.
    pub namespace: Option<String>,
}

/// `spec` of a Gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Gateway {
    /// Its class; decides who looks after it.
    pub gateway_class_name: String,
    /// Ports, each with hostnames, certificates and who may attach routes.
    #[serde(deserialize_with = "null_as_default")]
    pub listeners: Vec<Listener>,
    /// Where it listens: none (a Deployment is made), one IP address (so too), or the host names of Services there are.
    #[serde(deserialize_with = "null_as_default")]
    pub addresses: Vec<GatewayAddress>,
    /// What the objects made for it get.
    pub infrastructure: Option<Infrastructure>,
    /// Which ListenerSets may add listeners; none unless said.
    pub allowed_listeners: Option<AllowedListeners>,
    /// TLS of all listeners: clients' certificates.
    pub tls: Option<GatewayTls>,
    /// `None` or `All`: whether routes attach without naming it; not acted upon.
    pub default_scope: Option<String>,
}

/// One element of `addresses`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayAddress {
    /// `IPAddress`, `Hostname` or a name of somebody's own; `IPAddress` where it is left out.
    #[serde(rename = "type", default = "ip_address")]
    pub kind: String,
    /// The address.
    #[serde(default)]
    pub value: String,
}

fn ip_address() -> String {
    "IPAddress".to_owned()
}

/// `spec.infrastructure`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Infrastructure {
    /// In place of the Gateway's own labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// In place of the Gateway's own annotations.
    pub annotations: Option<BTreeMap<String, String>>,
    /// A ConfigMap of the namespace with changes to the objects that are made.
    pub parameters_ref: Option<ParametersReference>,
}

/// One element of `listeners`; that of a ListenerSet is the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Listener {
    /// Unique in its object: `sectionName` of routes.
    pub name: String,
    /// Which hosts: one name, perhaps with a wildcard; all where it is left out.
    pub hostname: Option<String>,
    /// The port of the Service. A ListenerSet may leave it to the protocol (0).
    pub port: u32,
    /// `HTTP`, `HTTPS`, `TLS`, `TCP` …
    pub protocol: String,
    /// For HTTPS and TLS.
    pub tls: Option<ListenerTls>,
    /// Which routes may attach: those of the Gateway's namespace unless said.
    #[serde(deserialize_with = "null_as_default")]
    pub allowed_routes: AllowedRoutes,
}

/// `tls` of a listener.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ListenerTls {
    /// Whether TLS ends here.
    pub mode: TlsMode,
    /// Secrets with the server's certificates.
    #[serde(deserialize_with = "null_as_default")]
    pub certificate_refs: Vec<ObjectReference>,
    /// `gateway.istio.io/…`.
    #[serde(deserialize_with = "null_as_default")]
    pub options: BTreeMap<String, String>,
}

/// `tls.mode` of a listener.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum TlsMode {
    /// It ends here.
    #[default]
    Terminate,
    /// It goes through as it is.
    Passthrough,
}

/// `allowedRoutes` of a listener.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AllowedRoutes {
    /// Of which namespaces.
    #[serde(deserialize_with = "null_as_default")]
    pub namespaces: RouteNamespaces,
    /// Of which kinds; those that fit the protocol where there are none.
    #[serde(deserialize_with = "null_as_default")]
    pub kinds: Vec<RouteGroupKind>,
}

/// `allowedRoutes.namespaces`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RouteNamespaces {
    /// Which.
    pub from: FromNamespaces,
    /// For `Selector`.
    pub selector: Option<LabelSelector>,
}

/// `from` of allowed namespaces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum FromNamespaces {
    /// The Gateway's own.
    #[default]
    Same,
    /// All.
    All,
    /// Those that the selector takes.
    Selector,
    /// None.
    None,
}

/// A kind of routes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteGroupKind {
    /// Gateway API's where it is left out.
    #[serde(default = "super::route::own_group")]
    pub group: String,
    /// e.g. `HTTPRoute`.
    #[serde(default)]
    pub kind: String,
}

/// Kubernetes' selector of labels.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LabelSelector {
    /// All of these.
    #[serde(deserialize_with = "null_as_default")]
    pub match_labels: BTreeMap<String, String>,
    /// And all of these.
    #[serde(deserialize_with = "null_as_default")]
    pub match_expressions: Vec<Expression>,
}

/// One element of `matchExpressions`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Expression {
    /// The label.
    pub key: String,
    /// How it is compared.
    pub operator: Operator,
    /// With what.
    #[serde(default, deserialize_with = "null_as_default")]
    pub values: Vec<String>,
}

/// How an [`Expression`] compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// It has none of them, or there is none.
    NotIn,
    /// There is one.
    Exists,
    /// There is none.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether it takes an object with these labels; a selector without conditions takes all.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        crate::labels_match(&self.match_labels, labels)
            && self.match_expressions.iter().all(|e| {
                let value = labels.get(&e.key);
                match e.operator {
                    Operator::In => value.is_some_and(|v| e.values.contains(v)),
                    Operator::NotIn => value.is_none_or(|v| !e.values.contains(v)),
                    Operator::Exists => value.is_some(),
                    Operator::DoesNotExist => value.is_none(),
                }
            })
    }
}

/// `spec.allowedListeners`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AllowedListeners {
    /// Of which namespaces.
    pub namespaces: Option<ListenerNamespaces>,
}

/// `allowedListeners.namespaces`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ListenerNamespaces {
    /// Which; none unless said.
    #[serde(default = "nobody")]
    pub from: FromNamespaces,
    /// For `Selector`.
    #[serde(default)]
    pub selector: Option<LabelSelector>,
}

fn nobody() -> FromNamespaces {
    FromNamespaces::None
}

/// `spec.tls` of a Gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GatewayTls {
    /// Our own certificate towards backends; not acted upon.
    pub backend: Option<CertificateMode>,
    /// What clients have to show.
    pub frontend: Option<Frontend>,
}

/// `spec.tls.backend`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CertificateMode {
    /// A Secret.
    pub client_certificate_ref: Option<ObjectReference>,
}

/// `spec.tls.frontend`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Frontend {
    /// For ports that are not named.
    #[serde(deserialize_with = "null_as_default")]
    pub default: ClientValidation,
    /// For some ports.
    #[serde(deserialize_with = "null_as_default")]
    pub per_port: Vec<PortTls>,
}

/// One element of `spec.tls.frontend.perPort`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PortTls {
    /// The port.
    pub port: u32,
    /// What holds there.
    #[serde(deserialize_with = "null_as_default")]
    pub tls: ClientValidation,
}

/// What clients have to show.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClientValidation {
    /// Nothing, where it is left out.
    pub validation: Option<FrontendValidation>,
}

/// `validation` of clients.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FrontendValidation {
    /// ConfigMaps or Secrets with the authorities (`ca.crt`).
    #[serde(deserialize_with = "null_as_default")]
    pub ca_certificate_refs: Vec<ObjectReference>,
    /// Whether who shows none is let in.
    pub mode: ValidationMode,
}

/// `validation.mode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum ValidationMode {
    /// Only clients with a certificate of an authority.
    #[default]
    AllowValidOnly,
    /// Everybody; the certificate is asked for.
    AllowInsecureFallback,
}

/// `spec` of a ListenerSet.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ListenerSet {
    /// The Gateway.
    pub parent_ref: Option<ParentReference>,
    /// Listeners added to it.
    #[serde(deserialize_with = "null_as_default")]
    pub listeners: Vec<Listener>,
}
