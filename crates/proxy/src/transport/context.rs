//! What the contexts of both sides are made of.

use std::sync::Arc;

use rustls::{CipherSuite as Suite, NamedGroup};
use tls::{
    certificate::Certificate,
    identity::Identity,
    parameters::Parameters,
    verify::{NamePolicy, Validation},
};

use super::{
    HandshakeError, Material, Secrets, Source,
    material::{Authorities, AuthoritySources},
};
use crate::plan::{
    matcher::StringPattern,
    tls::{
        CertificateSource, CipherSuite, CommonTls, Curve, SanKind, SanMatcher, TlsVersion,
        Validation as Rules,
    },
};

/// The sources of a context.
pub(crate) fn sources(common: &CommonTls) -> Vec<Source> {
    let mut found: Vec<_> = common
        .certificates
        .iter()
        .map(|source| match source {
            CertificateSource::Inline { chain, key } => Source::Certificate {
                chain: chain.clone(),
                key: key.clone(),
            },
            CertificateSource::Sds(secret) => Source::Sds(secret.clone()),
        })
        .collect();
    if let Some(rules) = &common.validation {
        let own = AuthoritySources::of(rules);
        if !own.is_empty() {
            found.push(Source::Authorities(own));
        }
        found.extend(rules.sds.clone().map(Source::Sds));
    }
    found
}

/// What a context is made of, as it was at one time.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) materials: Vec<Arc<Material>>,
    pub(super) identities: Vec<Identity>,
    pub(super) validation: Option<Validation>,
    /// What a peer is accepted by, for the digest of tickets.
    pub(super) fingerprint: Vec<u8>,
}

impl Parts {
    /// Gathers the parts; fails while one is missing.
    pub(super) fn gather(common: &CommonTls, secrets: &Secrets) -> Result<Self, HandshakeError> {
        let mut parts = Self {
            materials: Vec::new(),
            identities: Vec::new(),
            validation: None,
            fingerprint: Vec::new(),
        };
        let mut authorities = Vec::new();
        for source in sources(common) {
            let Some(material) = secrets.find(&source) else {
                return Err(HandshakeError::NotReady(match source {
                    Source::Sds(secret) => secret.name.to_string(),
                    _ => "a file".to_owned(),
                }));
            };
            let wanted = parts.materials.len() < common.certificates.len();
            match (&*material, wanted) {
                (Material::Certificate(identity), true) => {
                    parts.identities.push(identity.clone());
                }
                (
                    Material::Validation {
                        authorities: found,
                        rules,
                    },
                    false,
                ) => {
                    authorities.push((found.clone(), rules.clone()));
                }
                _ => {
                    let name = match &source {
                        Source::Sds(secret) => &*secret.name,
                        _ => "",
                    };
                    let kind = if wanted {
                        "certificate"
                    } else {
                        "validation context"
                    };
                    return Err(HandshakeError::Context(format!(
                        "secret `{name}` is not a {kind}"
                    )));
                }
            }
            parts.materials.push(material);
        }
        if let Some(rules) = &common.validation {
            parts.validate(rules, authorities)?;
        }
        Ok(parts)
    }

    /// Whether they are the same as others.
    pub(super) fn same(&self, others: &[Arc<Material>]) -> bool {
        self.materials.len() == others.len()
            && self
                .materials
                .iter()
                .zip(others)
                .all(|(own, other)| Arc::ptr_eq(own, other))
    }

    fn validate(
        &mut self,
        rules: &Rules,
        found: Vec<(Authorities, Option<Box<Rules>>)>,
    ) -> Result<(), HandshakeError> {
        let mut merged = rules.clone();
        let mut authorities = Authorities::default();
        for (more, rules) in found {
            // As Envoy merges the message from SDS into the default one: lists grow, what is set replaces.
            authorities.trust = more.trust.or(authorities.trust);
            if !more.lists.is_empty() {
                authorities.lists = more.lists;
            }
            authorities.domains.extend(more.domains);
            if let Some(rules) = rules {
                merged.match_sans.extend(rules.match_sans);
                merged.spki_pins.extend(rules.spki_pins);
                merged.certificate_hashes.extend(rules.certificate_hashes);
                merged.allow_expired |= rules.allow_expired;
                merged.accept_untrusted |= rules.accept_untrusted;
                merged.only_verify_leaf_crl |= rules.only_verify_leaf_crl;
            }
        }
        let trusts = authorities.trust.is_some() || !authorities.domains.is_empty();
        if !merged.match_sans.is_empty() && !trusts {
            return Err(HandshakeError::Context(
                "conditions on names without trusted_ca: anybody could claim such a name".into(),
            ));
        }
        self.fingerprint = format!("{:?}", (&merged.match_sans, &merged.spki_pins)).into_bytes();
        self.fingerprint
            .extend(merged.certificate_hashes.iter().flatten());
        let flags = [
            merged.allow_expired,
            merged.accept_untrusted,
            merged.only_verify_leaf_crl,
        ];
        self.fingerprint.extend(flags.map(u8::from));
        let domains = authorities
            .domains
            .iter()
            .map(|(name, trust)| (&**name, trust));
        let all = authorities
            .trust
            .iter()
            .map(|trust| ("", trust))
            .chain(domains);
        for (name, trust) in all {
            self.fingerprint.extend(name.as_bytes());
            trust
                .ders()
                .iter()
                .for_each(|der| self.fingerprint.extend(tls::certificate::sha256(der)));
        }
        // A list that grows makes clients prove themselves again.
        if !authorities.lists.is_empty() {
            self.fingerprint
                .extend((Arc::as_ptr(&authorities.lists).cast::<u8>() as usize).to_le_bytes());
        }
        let names = (!merged.match_sans.is_empty())
            .then(|| Arc::new(Names(merged.match_sans)) as Arc<dyn NamePolicy>);
        self.validation = Some(Validation {
            trust: authorities.trust,
            trust_domains: authorities.domains,
            revocation_lists: authorities.lists,
            only_leaf_revocation: merged.only_verify_leaf_crl,
            names,
            server_name: false,
            spki_pins: merged.spki_pins,
            certificate_hashes: merged.certificate_hashes,
            allow_expired: merged.allow_expired,
            accept_untrusted: merged.accept_untrusted,
        });
        Ok(())
    }
}

/// Versions, suites and groups in rustls' words.
pub(super) fn parameters(common: &CommonTls) -> Parameters {
    Parameters {
        no_tls12: common.min_version == Some(TlsVersion::V1_3),
        no_tls13: common.max_version == Some(TlsVersion::V1_2),
        cipher_suites: common.cipher_suites.iter().copied().map(suite).collect(),
        groups: common.curves.iter().copied().map(group).collect(),
    }
}

pub(super) fn alpn(names: &[Arc<str>]) -> Vec<Vec<u8>> {
    names.iter().map(|name| name.as_bytes().to_vec()).collect()
}

fn suite(suite: CipherSuite) -> Suite {
    use CipherSuite as C;
    match suite {
        C::EcdheEcdsaAes128Gcm => Suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        C::EcdheEcdsaAes256Gcm => Suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        C::EcdheEcdsaChacha20 => Suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        C::EcdheRsaAes128Gcm => Suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        C::EcdheRsaAes256Gcm => Suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        C::EcdheRsaChacha20 => Suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    }
}

fn group(curve: Curve) -> NamedGroup {
    match curve {
        Curve::X25519 => NamedGroup::X25519,
        Curve::P256 => NamedGroup::secp256r1,
        Curve::P384 => NamedGroup::secp384r1,
        Curve::X25519MlKem768 => NamedGroup::X25519MLKEM768,
    }
}

/// Conditions on subject alternative names, one of which must hold.
#[derive(Debug)]
struct Names(Vec<SanMatcher>);

impl NamePolicy for Names {
    fn accepts(&self, certificate: &Certificate) -> bool {
        self.0.iter().any(|wanted| {
            let is = |kind| wanted.kind == kind || wanted.kind == SanKind::Any;
            let text = |name: &str| wanted.matcher.matches(name.as_bytes());
            is(SanKind::Uri) && certificate.uris.iter().any(|name| text(name))
                || is(SanKind::Dns) && certificate.dns.iter().any(|name| dns(wanted, name))
                || is(SanKind::Email) && certificate.emails.iter().any(|name| text(name))
                || is(SanKind::Ip) && certificate.ips.iter().any(|ip| text(&ip.to_string()))
        })
    }
}

/// A certificate for `*.example.com` has the name `a.example.com`, where exactly that is asked for.
fn dns(wanted: &SanMatcher, name: &str) -> bool {
    let StringPattern::Exact(exact) = &wanted.matcher.pattern else {
        return wanted.matcher.matches(name.as_bytes());
    };
    if exact.eq_ignore_ascii_case(name) {
        return true;
    }
    let (Some(suffix), Some((label, rest))) = (name.strip_prefix("*."), exact.split_once('.'))
    else {
        return false;
    };
    !label.is_empty() && rest.eq_ignore_ascii_case(suffix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::matcher::StringMatcher;

    #[test]
    fn names_are_compared_by_kind() {
        let made = {
            let mut params =
                rcgen::CertificateParams::new(vec!["*.example.com".into()]).expect("a good name");
            params.subject_alt_names.push(rcgen::SanType::URI(
                "spiffe://td/ns/a/sa/b".try_into().expect("ASCII"),
            ));
            let key = rcgen::KeyPair::generate().expect("keys can be made");
            params.self_signed(&key).expect("it can be signed")
        };
        let certificate = Certificate::read(made.der()).expect("it is one");
        let accepts = |kind, pattern| {
            let matcher = StringMatcher {
                pattern,
                ignore_case: false,
            };
            Names(vec![SanMatcher { kind, matcher }]).accepts(&certificate)
        };
        let exact = |text: &str| StringPattern::Exact(text.into());
        let uri = "spiffe://td/ns/a/sa/b";
        assert!(accepts(SanKind::Uri, exact(uri)));
        assert!(accepts(SanKind::Any, exact(uri)));
        assert!(!accepts(SanKind::Dns, exact(uri)));
        assert!(accepts(
            SanKind::Uri,
            StringPattern::Prefix("spiffe://td/".into())
        ));
        assert!(!accepts(SanKind::Uri, exact("spiffe://td/ns/a/sa/")));
        assert!(accepts(SanKind::Dns, exact("A.example.com")));
        assert!(!accepts(SanKind::Dns, exact("a.b.example.com")));
        assert!(!accepts(SanKind::Dns, exact(".example.com")));
        assert!(!accepts(
            SanKind::Dns,
            StringPattern::Suffix("a.example.com".into())
        ));
    }
}
