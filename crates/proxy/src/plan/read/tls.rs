//! TLS contexts and secrets.

use std::sync::Arc;

use base64::{Engine, prelude::BASE64_STANDARD};
use proto::envoy::{
    config::core::v3 as core,
    extensions::transport_sockets::tls::v3::{self as pb, common_tls_context as nested},
};

use super::common::{config_source, data_source, enumeration, string_matcher, typed_config};
use crate::plan::{
    error::{At, Step, unsupported},
    tls::{
        CertificateSource, CipherSuite, CommonTls, Curve, DataSource, DownstreamTls, SanKind,
        SanMatcher, SdsSecret, Secret, SecretKind, TlsVersion, UpstreamTls, Validation,
    },
};

/// `DownstreamTlsContext`.
pub(super) fn downstream_tls(at: At<'_>, m: &pb::DownstreamTlsContext) -> Step<DownstreamTls> {
    use pb::downstream_tls_context::SessionTicketKeysType as T;
    let pb::DownstreamTlsContext {
        common_tls_context,
        require_client_certificate,
        require_sni,
        disable_stateful_session_resumption,
        session_timeout: _,
        // No OCSP response is stapled; LENIENT_STAPLING allows that.
        ocsp_staple_policy,
        full_scan_certs_on_sni_mismatch: _,
        prefer_client_ciphers,
        session_ticket_keys_type,
    } = m;
    unsupported!(at, ocsp_staple_policy);
    let disable_stateless_session_resumption = match session_ticket_keys_type {
        None => false,
        Some(T::DisableStatelessSessionResumption(disabled)) => *disabled,
        Some(T::SessionTicketKeys(_) | T::SessionTicketKeysSdsSecretConfig(_)) => {
            return Err(at
                .field("session_ticket_keys")
                .not_implemented("is not implemented; remove it"));
        }
    };
    let common = at
        .optional("common_tls_context", common_tls_context, common_tls)?
        .unwrap_or_default();
    if common.certificates.is_empty() {
        let at = at.field("common_tls_context");
        at.error("needs a certificate: tls_certificates or tls_certificate_sds_secret_configs");
    }
    Ok(DownstreamTls {
        common,
        require_client_certificate: require_client_certificate.unwrap_or(false),
        require_sni: require_sni.unwrap_or(false),
        disable_stateless_session_resumption,
        disable_stateful_session_resumption: *disable_stateful_session_resumption,
        prefer_client_ciphers: *prefer_client_ciphers,
    })
}

/// `UpstreamTlsContext`.
pub(super) fn upstream_tls(at: At<'_>, m: &pb::UpstreamTlsContext) -> Step<UpstreamTls> {
    let pb::UpstreamTlsContext {
        common_tls_context,
        sni,
        auto_host_sni,
        auto_sni_san_validation,
        // rustls has no renegotiation; nothing that a server of TLS 1.2 must ask for.
        allow_renegotiation,
        max_session_keys,
        enforce_rsa_key_usage: _,
    } = m;
    unsupported!(at, allow_renegotiation);
    Ok(UpstreamTls {
        common: at
            .optional("common_tls_context", common_tls_context, common_tls)?
            .unwrap_or_default(),
        sni: sni.as_str().into(),
        auto_host_sni: *auto_host_sni,
        auto_sni_san_validation: *auto_sni_san_validation,
        max_session_keys: max_session_keys.unwrap_or(1),
    })
}

fn common_tls(at: At<'_>, m: &pb::CommonTlsContext) -> Step<CommonTls> {
    let pb::CommonTlsContext {
        tls_params,
        tls_certificates,
        tls_certificate_sds_secret_configs,
        tls_certificate_provider_instance,
        custom_tls_certificate_selector,
        tls_certificate_certificate_provider,
        tls_certificate_certificate_provider_instance,
        alpn_protocols,
        custom_handshaker,
        key_log,
        validation_context_type,
    } = m;
    unsupported!(
        at,
        tls_certificate_provider_instance,
        custom_tls_certificate_selector,
        tls_certificate_certificate_provider,
        tls_certificate_certificate_provider_instance,
        custom_handshaker,
        key_log,
    );
    let mut certificates = at.each("tls_certificates", tls_certificates, |at, m| {
        let (chain, key) = certificate(at, m)?;
        Ok(CertificateSource::Inline { chain, key })
    });
    certificates.extend(at.each(
        "tls_certificate_sds_secret_configs",
        tls_certificate_sds_secret_configs,
        |at, m| sds(at, m).map(CertificateSource::Sds),
    ));
    let mut planned = CommonTls {
        certificates,
        alpn: protocols(&at, alpn_protocols),
        validation: validation_type(&at, validation_context_type)?,
        ..CommonTls::default()
    };
    if let Some(params) = tls_params {
        parameters(at.field("tls_params"), params, &mut planned)?;
    }
    Ok(planned)
}

/// `alpn_protocols`. One entry may name several, divided by commas, as in Envoy: its documents write `["h2,http/1.1"]`.
fn protocols(at: &At<'_>, list: &[String]) -> Vec<Arc<str>> {
    let lists = at.each("alpn_protocols", list, |at, names| {
        let names = names.split(',').map(|name| match name.len() {
            1..=255 => Ok(Arc::from(name)),
            _ => Err(at.error("must have 1 to 255 bytes")),
        });
        names.collect::<Step<Vec<_>>>()
    });
    lists.into_iter().flatten().collect()
}

fn parameters(at: At<'_>, m: &pb::TlsParameters, planned: &mut CommonTls) -> Step<()> {
    use pb::tls_parameters::TlsProtocol as P;
    let pb::TlsParameters {
        tls_minimum_protocol_version,
        tls_maximum_protocol_version,
        cipher_suites,
        ecdh_curves,
        signature_algorithms: _,
        compliance_policies,
    } = m;
    unsupported!(at, compliance_policies);
    planned.min_version = match enumeration(
        &at,
        "tls_minimum_protocol_version",
        *tls_minimum_protocol_version,
    )? {
        P::TlsAuto => None,
        // rustls begins with 1.2; older ones are not offered.
        P::TlSv10 | P::TlSv11 | P::TlSv12 => Some(TlsVersion::V1_2),
        P::TlSv13 => Some(TlsVersion::V1_3),
    };
    planned.max_version = match enumeration(
        &at,
        "tls_maximum_protocol_version",
        *tls_maximum_protocol_version,
    )? {
        P::TlsAuto => None,
        P::TlSv10 | P::TlSv11 => {
            let at = at.field("tls_maximum_protocol_version");
            return Err(
                at.not_implemented("TLS 1.0 and 1.1 are not implemented; write TLSv1_2 or higher")
            );
        }
        P::TlSv12 => Some(TlsVersion::V1_2),
        P::TlSv13 => Some(TlsVersion::V1_3),
    };
    if planned.min_version > planned.max_version && planned.max_version.is_some() {
        at.error("has tls_minimum_protocol_version above tls_maximum_protocol_version");
    }
    // Names that rustls lacks are dropped while one remains.
    planned.cipher_suites = cipher_suites.iter().flat_map(|line| suites(line)).collect();
    if !cipher_suites.is_empty() && planned.cipher_suites.is_empty() {
        at.field("cipher_suites").error(format!(
            "none of {} is available; write one of {}",
            cipher_suites.join(", "),
            SUITES.map(|(name, _)| name).join(", ")
        ));
    }
    planned.curves = ecdh_curves.iter().filter_map(|name| curve(name)).collect();
    if !ecdh_curves.is_empty() && planned.curves.is_empty() {
        at.field("ecdh_curves").error(format!(
            "none of {} is available; write one of X25519, P-256, P-384, X25519MLKEM768",
            ecdh_curves.join(", ")
        ));
    }
    Ok(())
}

/// Suites of one entry; `[A|B]` is a group of equal preference.
fn suites(line: &str) -> Vec<CipherSuite> {
    let names = line.trim_matches(['[', ']']).split('|');
    names
        .filter_map(|name| {
            SUITES
                .iter()
                .find(|(known, _)| *known == name.trim())
                .map(|(_, s)| *s)
        })
        .collect()
}

const SUITES: [(&str, CipherSuite); 6] = [
    (
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        CipherSuite::EcdheEcdsaAes256Gcm,
    ),
    (
        "ECDHE-RSA-AES256-GCM-SHA384",
        CipherSuite::EcdheRsaAes256Gcm,
    ),
    (
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        CipherSuite::EcdheEcdsaAes128Gcm,
    ),
    (
        "ECDHE-RSA-AES128-GCM-SHA256",
        CipherSuite::EcdheRsaAes128Gcm,
    ),
    (
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        CipherSuite::EcdheEcdsaChacha20,
    ),
    ("ECDHE-RSA-CHACHA20-POLY1305", CipherSuite::EcdheRsaChacha20),
];

fn curve(name: &str) -> Option<Curve> {
    Some(match name {
        "X25519" => Curve::X25519,
        "P-256" | "prime256v1" => Curve::P256,
        "P-384" | "secp384r1" => Curve::P384,
        "X25519MLKEM768" => Curve::X25519MlKem768,
        _ => return None,
    })
}

type Pair = (DataSource, DataSource);

fn certificate(at: At<'_>, m: &pb::TlsCertificate) -> Step<Pair> {
    let pb::TlsCertificate {
        certificate_chain,
        private_key,
        pkcs12,
        // A file is read again when it changes, whatever is watched.
        watched_directory: _,
        private_key_provider,
        password,
        ocsp_staple,
        signed_certificate_timestamp: _,
        tls_params,
    } = m;
    unsupported!(
        at,
        pkcs12,
        private_key_provider,
        password,
        ocsp_staple,
        tls_params,
    );
    let chain = at.required("certificate_chain", certificate_chain, data_source);
    let key = at.required("private_key", private_key, data_source);
    Ok((chain?, key?))
}

fn validation_type(
    at: &At<'_>,
    m: &Option<nested::ValidationContextType>,
) -> Step<Option<Validation>> {
    use nested::ValidationContextType as V;
    Ok(Some(match m {
        None => return Ok(None),
        Some(V::ValidationContext(m)) => {
            let at = at.field("validation_context");
            let planned = validation(at, m)?;
            complete(&at, &planned);
            planned
        }
        Some(V::ValidationContextSdsSecretConfig(m)) => Validation {
            sds: Some(sds(at.field("validation_context_sds_secret_config"), m)?),
            ..Validation::default()
        },
        Some(V::CombinedValidationContext(m)) => {
            let at = at.field("combined_validation_context");
            let nested::CombinedCertificateValidationContext {
                default_validation_context,
                validation_context_sds_secret_config,
                validation_context_certificate_provider,
                validation_context_certificate_provider_instance,
            } = m;
            unsupported!(
                at,
                validation_context_certificate_provider,
                validation_context_certificate_provider_instance,
            );
            let default = at.required(
                "default_validation_context",
                default_validation_context,
                validation,
            );
            let sds = at.required(
                "validation_context_sds_secret_config",
                validation_context_sds_secret_config,
                sds,
            );
            Validation {
                sds: Some(sds?),
                ..default?
            }
        }
        Some(
            V::ValidationContextCertificateProvider(_)
            | V::ValidationContextCertificateProviderInstance(_),
        ) => {
            return Err(at.not_implemented(
                "certificate providers are not implemented; write validation_context",
            ));
        }
    }))
}

fn validation(at: At<'_>, m: &pb::CertificateValidationContext) -> Step<Validation> {
    use pb::{
        certificate_validation_context::TrustChainVerification, subject_alt_name_matcher::SanType,
    };
    let pb::CertificateValidationContext {
        trusted_ca,
        ca_certificate_provider_instance,
        system_root_certs,
        watched_directory: _,
        verify_certificate_spki,
        verify_certificate_hash,
        match_typed_subject_alt_names,
        match_subject_alt_names,
        require_signed_certificate_timestamp,
        crl,
        allow_expired_certificate,
        trust_chain_verification,
        custom_validator_config,
        only_verify_leaf_cert_crl,
        max_verify_depth,
        suppress_client_ca_list,
    } = m;
    unsupported!(
        at,
        ca_certificate_provider_instance,
        system_root_certs,
        require_signed_certificate_timestamp,
        max_verify_depth,
        suppress_client_ca_list,
    );
    let trust_domains = at.optional("custom_validator_config", custom_validator_config, spiffe)?;
    let spki_pins = at.each(
        "verify_certificate_spki",
        verify_certificate_spki,
        |at, pin| {
            let bytes = BASE64_STANDARD.decode(pin).ok();
            bytes
                .and_then(|bytes| bytes.try_into().ok())
                .ok_or_else(|| at.error("must be the base64 of a SHA-256 (44 characters)"))
        },
    );
    let certificate_hashes = at.each(
        "verify_certificate_hash",
        verify_certificate_hash,
        |at, hash| {
            hex(&hash.replace(':', ""))
                .ok_or_else(|| at.error("must be a SHA-256 in hex, with or without colons"))
        },
    );
    let mut match_sans = at.each(
        "match_typed_subject_alt_names",
        match_typed_subject_alt_names,
        |at, m| {
            let kind = match enumeration(&at, "san_type", m.san_type)? {
                SanType::Email => SanKind::Email,
                SanType::Dns => SanKind::Dns,
                SanType::Uri => SanKind::Uri,
                SanType::IpAddress => SanKind::Ip,
                SanType::OtherName | SanType::Unspecified => {
                    return Err(at
                        .field("san_type")
                        .error("must be one of EMAIL, DNS, URI, IP_ADDRESS"));
                }
            };
            Ok(SanMatcher {
                kind,
                matcher: at.required("matcher", &m.matcher, string_matcher)?,
            })
        },
    );
    match_sans.extend(at.each(
        "match_subject_alt_names",
        match_subject_alt_names,
        |at, m| {
            Ok(SanMatcher {
                kind: SanKind::Any,
                matcher: string_matcher(at, m)?,
            })
        },
    ));
    Ok(Validation {
        trusted_ca: at.optional("trusted_ca", trusted_ca, data_source)?,
        sds: None,
        match_sans,
        crl: at.optional("crl", crl, data_source)?,
        spki_pins,
        certificate_hashes,
        allow_expired: *allow_expired_certificate,
        accept_untrusted: enumeration::<TrustChainVerification>(
            &at,
            "trust_chain_verification",
            *trust_chain_verification,
        )? == TrustChainVerification::AcceptUntrusted,
        only_verify_leaf_crl: *only_verify_leaf_cert_crl,
        trust_domains: trust_domains.unwrap_or_default(),
    })
}

/// What a validation that is not merged with another one must have.
fn complete(at: &At<'_>, planned: &Validation) {
    let trusts = planned.trusted_ca.is_some() || !planned.trust_domains.is_empty();
    if !planned.match_sans.is_empty() && !trusts {
        at.error("has conditions on names without trusted_ca: anybody could claim such a name");
    }
    if planned.crl.is_some() && !trusts {
        at.error("has a crl without trusted_ca");
    }
}

/// `SPIFFECertValidatorConfig`, the one custom validator: authorities by trust domain.
fn spiffe(at: At<'_>, m: &core::TypedExtensionConfig) -> Step<Vec<(Arc<str>, DataSource)>> {
    let found = typed_config(&at, &m.typed_config, "certificate validator")?;
    let at = at.field("typed_config");
    if found.name != "envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig" {
        return Err(found.unknown(&at, "certificate validator"));
    }
    let pb::SpiffeCertValidatorConfig {
        trust_domains,
        trust_bundles,
    } = &found.decode(&at)?;
    unsupported!(at, trust_bundles);
    let planned: Vec<(Arc<str>, DataSource)> = at.each("trust_domains", trust_domains, |at, m| {
        let workload_trust_domain = &m.workload_trust_domain;
        unsupported!(at, workload_trust_domain);
        let name = at.text("name", &m.name)?;
        let bundle = at.required("trust_bundle", &m.trust_bundle, data_source)?;
        Ok((name, bundle))
    });
    if planned.is_empty() {
        at.field("trust_domains")
            .error("needs at least one trust domain");
    }
    let mut names: Vec<_> = planned.iter().map(|(name, _)| name).collect();
    names.sort();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        at.field("trust_domains")
            .error("names a trust domain twice");
    }
    Ok(planned)
}

/// 64 hex digits.
fn hex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(out)
}

/// `SdsSecretConfig`.
pub(super) fn sds(at: At<'_>, m: &pb::SdsSecretConfig) -> Step<SdsSecret> {
    Ok(SdsSecret {
        name: at.text("name", &m.name)?,
        source: at.optional("sds_config", &m.sds_config, config_source)?,
    })
}

/// `Secret`.
pub(super) fn secret(at: At<'_>, m: &pb::Secret) -> Step<Secret> {
    use pb::secret::Type;
    let kind = match &m.r#type {
        Some(Type::TlsCertificate(m)) => {
            let (chain, key) = certificate(at.field("tls_certificate"), m)?;
            SecretKind::Certificate { chain, key }
        }
        Some(Type::ValidationContext(m)) => {
            SecretKind::Validation(validation(at.field("validation_context"), m)?)
        }
        Some(Type::SessionTicketKeys(_)) => {
            return Err(at
                .field("session_ticket_keys")
                .not_implemented("is not implemented; remove it"));
        }
        Some(Type::GenericSecret(m)) => {
            let pb::GenericSecret { secret, secrets } = m;
            let at = at.field("generic_secret");
            unsupported!(at, secrets);
            SecretKind::Generic(at.required("secret", secret, data_source)?)
        }
        None => {
            return Err(
                at.error("needs one of tls_certificate, validation_context, generic_secret")
            );
        }
    };
    Ok(Secret {
        name: m.name.as_str().into(),
        kind,
    })
}
