//! ReferenceGrant and BackendTLSPolicy.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::object::null_as_default;

/// `spec` of a ReferenceGrant: who of other namespaces may refer to what of this one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ReferenceGrant {
    /// Who.
    #[serde(deserialize_with = "null_as_default")]
    pub from: Vec<GrantFrom>,
    /// To what.
    #[serde(deserialize_with = "null_as_default")]
    pub to: Vec<GrantTo>,
}

/// One element of `from`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrantFrom {
    /// Group of the referrer.
    pub group: String,
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
}

/// One element of `to`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrantTo {
    /// Group of what is referred to; empty for the core group.
    pub group: String,
    /// Its kind.
    pub kind: String,
    /// Its name; all of the kind where it is left out.
    pub name: Option<String>,
}

/// `spec` of a BackendTLSPolicy: TLS towards a backend.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BackendTlsPolicy {
    /// The backends, of the policy's own namespace.
    #[serde(deserialize_with = "null_as_default")]
    pub target_refs: Vec<PolicyTarget>,
    /// Whom the backend has to prove to be.
    pub validation: BackendValidation,
    /// Of implementations.
    #[serde(deserialize_with = "null_as_default")]
    pub options: BTreeMap<String, String>,
}

/// One element of `targetRefs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PolicyTarget {
    /// Group; empty for the core group.
    pub group: String,
    /// `Service` (or `ServiceEntry` of Istio).
    pub kind: String,
    /// Its name.
    pub name: String,
    /// The name of one of its ports; all where it is left out.
    pub section_name: Option<String>,
}

/// `validation` of a BackendTLSPolicy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BackendValidation {
    /// ConfigMaps with the authorities (`ca.crt`).
    #[serde(deserialize_with = "null_as_default")]
    pub ca_certificate_refs: Vec<LocalReference>,
    /// In place of references.
    #[serde(rename = "wellKnownCACertificates")]
    pub well_known_ca_certificates: Option<WellKnownCaCertificates>,
    /// SNI, and the name that the certificate has to carry unless there are `subjectAltNames`.
    pub hostname: String,
    /// Names of which the certificate has to carry one.
    #[serde(deserialize_with = "null_as_default")]
    pub subject_alt_names: Vec<SubjectAltName>,
}

/// `wellKnownCACertificates`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum WellKnownCaCertificates {
    /// Those of the proxy's operating system.
    System,
}

/// An object of the own namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LocalReference {
    /// Empty for the core group.
    pub group: String,
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// One element of `subjectAltNames`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SubjectAltName {
    /// Which of the two is given.
    #[serde(rename = "type")]
    pub kind: SubjectAltNameType,
    /// For `Hostname`.
    #[serde(default)]
    pub hostname: String,
    /// For `URI`.
    #[serde(default)]
    pub uri: String,
}

/// `type` of a [`SubjectAltName`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum SubjectAltNameType {
    /// A DNS name.
    Hostname,
    /// A URI, e.g. a SPIFFE identity.
    #[serde(rename = "URI")]
    Uri,
}
