//! `/certs`: the certificates that are in use; and secrets as `/config_dump` may show them.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message;
use proto::{
    Timestamp,
    envoy::{
        admin::v3::{
            Certificate as Entry, CertificateDetails, Certificates, ClientResourceStatus,
            SecretsConfigDump, SubjectAlternateName,
            secrets_config_dump::{DynamicSecret, StaticSecret},
            subject_alternate_name::Name,
        },
        config::bootstrap::v3::Bootstrap as BootstrapMessage,
    },
};
use regex::Regex;
use serde_json::Value;
use tls::certificate::Certificate;
use xds::type_url::SDS;

use super::{
    Admin, Answer,
    config_dump::{any, failure, timestamp},
};
use crate::{
    discovery::Truth,
    plan::tls::DataSource,
    transport::{Material, Source},
};

/// `/certs`.
pub(super) fn certs(admin: &Admin) -> Answer {
    let mut found = Certificates::default();
    for (source, material) in admin.server.tls_materials() {
        let path = path(&source);
        let mut entry = Entry::default();
        match &*material {
            Material::Certificate(identity) => {
                let chain = std::iter::once(&**identity.leaf()).chain(identity.chain());
                entry.cert_chain = chain.map(|c| details(c, &path)).collect();
            }
            // No certificate: not asked for.
            Material::Text(_) => continue,
            Material::Validation { authorities, .. } => {
                let domains = authorities.domains.iter().map(|(_, trust)| trust);
                entry.ca_cert = domains
                    .chain(&authorities.trust)
                    .flat_map(|trust| trust.certificates())
                    .map(|c| details(&c, &path))
                    .collect();
            }
        }
        found.certificates.push(entry);
    }
    Answer::message(&found)
}

fn path(source: &Source) -> String {
    let of = |source: &DataSource| match source {
        DataSource::File(path) => Path::display(path).to_string(),
        DataSource::Inline(_) | DataSource::Environment(_) => "<inline>".to_owned(),
    };
    match source {
        Source::Certificate { chain, .. } => of(chain),
        Source::Authorities(sources) => sources.first().map_or_else(String::new, of),
        Source::Sds(secret) => secret.name.to_string(),
        Source::Text(path) => path.display().to_string(),
    }
}

fn details(certificate: &Certificate, path: &str) -> CertificateDetails {
    let dns = certificate.dns.iter().map(|n| Name::Dns(n.to_string()));
    let uris = certificate.uris.iter().map(|n| Name::Uri(n.to_string()));
    let ips = certificate
        .ips
        .iter()
        .map(|n| Name::IpAddress(n.to_string()));
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs() as i64);
    let left = (certificate.not_after - now).max(0) as u64;
    let time = |seconds| Some(Timestamp { seconds, nanos: 0 });
    CertificateDetails {
        path: path.to_owned(),
        serial_number: certificate.serial.to_string(),
        subject_alt_names: dns
            .chain(uris)
            .chain(ips)
            .map(|name| SubjectAlternateName { name: Some(name) })
            .collect(),
        days_until_expiration: left / 86_400,
        valid_from: time(certificate.not_before),
        expiration_time: time(certificate.not_after),
        ocsp_details: None,
    }
}

/// The secrets, with the private parts still in: [`redact`] goes over every dump.
pub(super) fn secrets(admin: &Admin, truth: &Truth, name: Option<&Regex>) -> SecretsConfigDump {
    let mut dump = SecretsConfigDump::default();
    let bootstrap = &admin.server.bootstrap;
    let message = BootstrapMessage::decode(&*bootstrap.encoded).unwrap_or_default();
    for secret in message.static_resources.iter().flat_map(|r| &r.secrets) {
        if name.is_none_or(|r| r.is_match(&secret.name)) {
            dump.static_secrets.push(StaticSecret {
                name: secret.name.clone(),
                secret: Some(any(SDS, &secret.encode_to_vec())),
                last_updated: None,
            });
        }
    }
    for secret in truth.needed_secrets() {
        if !name.is_none_or(|r| r.is_match(&secret.name)) {
            continue;
        }
        let entry = truth.secrets.get(&secret);
        let active = entry.and_then(|e| e.active.as_ref());
        let shown = DynamicSecret {
            name: secret.name.to_string(),
            version_info: active.map(|v| v.version.to_string()).unwrap_or_default(),
            last_updated: active.map(|v| timestamp(v.updated)),
            secret: active.map(|v| any(SDS, &v.resource)),
            error_state: entry
                .and_then(|e| e.error.as_deref())
                .map(|e| failure(SDS, e)),
            client_status: ClientResourceStatus::Unknown as i32,
        };
        match active {
            Some(_) => dump.dynamic_active_secrets.push(shown),
            None => dump.dynamic_warming_secrets.push(shown),
        }
    }
    dump
}

/// Takes keys and passwords out of a dump, wherever they stand.
pub(super) fn redact(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(redact),
        Value::Object(members) => {
            for (name, value) in members {
                match name.as_str() {
                    "privateKey" | "password" | "pkcs12" | "secret" | "keys" if hides(value) => {
                        hide(value);
                    }
                    _ => redact(value),
                }
            }
        }
        _ => {}
    }
}

/// Whether it is a `DataSource` with content, or a list of such.
fn hides(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().any(hides),
        value => value.get("inlineBytes").is_some() || value.get("inlineString").is_some(),
    }
}

fn hide(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(hide),
        Value::Object(members) => {
            for (name, value) in members {
                match name.as_str() {
                    // `[redacted]`, in bytes and in text.
                    "inlineBytes" => *value = "W3JlZGFjdGVkXQ==".into(),
                    "inlineString" => *value = "[redacted]".into(),
                    _ => {}
                }
            }
        }
        _ => {}
    }
}
