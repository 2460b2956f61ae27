//! The mesh's trust domain and its aliases in policies: who is named under one of them is meant under all.

use proto::istio::mesh::v1alpha1::MeshConfig;

/// Stands for the mesh's own trust domain, whatever that is called.
const LOCAL: &str = "cluster.local";

/// The trust domain of the mesh, then its aliases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TrustDomains(Vec<String>);

impl TrustDomains {
    pub(crate) fn of(mesh: &MeshConfig) -> Self {
        let own = std::iter::once(&mesh.trust_domain);
        Self(own.chain(&mesh.trust_domain_aliases).cloned().collect())
    }

    /// Principals (`TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`) with those that aliases make of them. What does not name
    /// one of the mesh's trust domains stays as it is.
    pub(crate) fn principals(&self, principals: &[String]) -> Vec<String> {
        let mut out = Vec::with_capacity(principals.len());
        for principal in principals {
            match principal.split_once('/') {
                Some((domain, rest))
                    if rest.split('/').count() == 4
                        && domain != "*"
                        && (domain == LOCAL || self.0.iter().any(|own| alike(domain, own))) =>
                {
                    out.extend(self.under_each(principal, domain, rest));
                }
                _ => out.push(principal.clone()),
            }
        }
        out
    }

    /// Trust domains with the aliases of those that are the mesh's.
    pub(crate) fn expand(&self, domains: &[String]) -> Vec<String> {
        let mut out: Vec<String> = Vec::with_capacity(domains.len());
        for domain in domains {
            let of_mesh = self.0.contains(domain);
            let all = if of_mesh {
                self.0.as_slice()
            } else {
                std::slice::from_ref(domain)
            };
            for one in all {
                if !out.contains(one) {
                    out.push(one.clone());
                }
            }
        }
        out
    }

    fn under_each(&self, principal: &str, domain: &str, rest: &str) -> Vec<String> {
        let mut out: Vec<String> = Vec::with_capacity(self.0.len());
        for own in &self.0 {
            let renamed = if ends_like(own, domain) {
                principal.to_owned()
            } else {
                format!("{own}/{rest}")
            };
            if !out.contains(&renamed) {
                out.push(renamed);
            }
        }
        out
    }
}

/// Equal, or one is a pattern for the other.
fn alike(a: &str, b: &str) -> bool {
    a == b
        || b == "*"
        || starts_like(a, b)
        || starts_like(b, a)
        || ends_like(a, b)
        || ends_like(b, a)
}

fn starts_like(text: &str, pattern: &str) -> bool {
    pattern
        .strip_suffix('*')
        .is_some_and(|p| text.starts_with(p))
}

fn ends_like(text: &str, pattern: &str) -> bool {
    pattern.strip_prefix('*').is_some_and(|p| text.ends_with(p))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains(all: &[&str]) -> TrustDomains {
        TrustDomains(all.iter().map(ToString::to_string).collect())
    }

    fn principals(all: &[&str], principal: &str) -> Vec<String> {
        domains(all).principals(&[principal.to_owned()])
    }

    #[test]
    fn an_account_is_meant_under_every_alias() {
        let both = ["td2/ns/foo/sa/bar", "td1/ns/foo/sa/bar"];
        assert_eq!(principals(&["td2", "td1"], "td1/ns/foo/sa/bar"), both);
        assert_eq!(
            principals(&["td2", "td1"], "cluster.local/ns/foo/sa/bar"),
            both
        );
    }

    #[test]
    fn others_stay_as_they_are() {
        for principal in ["*/ns/foo/sa/bar", "sa/bar", "elsewhere/ns/foo/sa/bar", "*"] {
            assert_eq!(principals(&["td2", "td1"], principal), [principal]);
        }
    }

    #[test]
    fn a_pattern_that_covers_a_domain_is_kept_for_it() {
        assert_eq!(
            principals(&["new-td", "old-td", "other"], "*-td/ns/foo/sa/bar"),
            ["*-td/ns/foo/sa/bar", "other/ns/foo/sa/bar"]
        );
    }

    #[test]
    fn trust_domains_bring_their_aliases() {
        let all = domains(&["td1", "td2"]);
        assert_eq!(all.expand(&["td2".into(), "x".into()]), ["td1", "td2", "x"]);
    }
}
