//! SPIFFE identities of workloads, in Istio's form: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.

use std::{fmt, str::FromStr};

/// Who a workload is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    trust_domain: String,
    namespace: String,
    service_account: String,
}

/// Why a text is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no workload identity: {problem}")]
pub struct NotAnIdentity {
    text: String,
    problem: &'static str,
}

impl Identity {
    /// From its parts.
    ///
    /// # Errors
    /// A part is empty or has a character that would make it another identity when written out.
    pub fn new(
        trust_domain: impl Into<String>,
        namespace: impl Into<String>,
        service_account: impl Into<String>,
    ) -> Result<Self, NotAnIdentity> {
        let out = Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        };
        let wrong = |problem| NotAnIdentity {
            text: out.to_string(),
            problem,
        };
        let domain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
        if out.trust_domain.is_empty() || !out.trust_domain.bytes().all(domain) {
            return Err(wrong(
                "the trust domain has lower-case letters, digits, dots, dashes and underscores (SPIFFE-ID 2.1)",
            ));
        }
        let segment = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        for part in [&out.namespace, &out.service_account] {
            if part.is_empty() || !part.bytes().all(segment) || matches!(&**part, "." | "..") {
                return Err(wrong(
                    "namespace and service account have letters, digits, dots, dashes and underscores",
                ));
            }
        }
        Ok(out)
    }

    /// The domain of the authority behind it.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl FromStr for Identity {
    type Err = NotAnIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |problem| NotAnIdentity {
            text: text.to_owned(),
            problem,
        };
        let rest = text
            .strip_prefix("spiffe://")
            .ok_or_else(|| wrong("it must begin with spiffe://"))?;
        match rest.split('/').collect::<Vec<_>>().as_slice() {
            [domain, "ns", namespace, "sa", account] => Self::new(*domain, *namespace, *account),
            _ => Err(wrong(
                "the form is spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let text = "spiffe://cluster.local/ns/bookinfo/sa/bookinfo-reviews";
        let identity: Identity = text.parse().unwrap();
        assert_eq!(identity.namespace(), "bookinfo");
        assert_eq!(identity.service_account(), "bookinfo-reviews");
        assert_eq!(identity.to_string(), text);
    }

    #[test]
    fn nothing_else_passes_for_one() {
        for text in [
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a",
            "spiffe://cluster.local/ns/a/sa/b/more",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe:///ns/a/sa/b",
            "spiffe://Cluster.Local/ns/a/sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a/sa/b?x",
            "spiffe://user@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:80/ns/a/sa/b",
            "spiffe://cluster.local/ns/a%2Fb/sa/c",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
        assert!(Identity::new("cluster.local", "a/sa/b", "c").is_err());
    }
}
