//! Certificates, keys, authorities, and texts that formats print: where they come from and what they are once read.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use tls::{
    identity::Identity,
    trust::{Trust, revocation_lists},
    verify::RevocationList,
};

use crate::plan::tls::{DataSource, SdsSecret, Secret, SecretKind, Validation};

/// Where something that handshakes need comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// A chain and its key.
    Certificate { chain: DataSource, key: DataSource },
    /// Authorities, and what belongs to them.
    Authorities(AuthoritySources),
    /// Either, from SDS; or a text.
    Sds(SdsSecret),
    /// A text that formats print.
    Text(PathBuf),
}

/// The parts of [`Authorities`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct AuthoritySources {
    ca: Option<DataSource>,
    crl: Option<DataSource>,
    domains: Vec<(Arc<str>, DataSource)>,
}

impl AuthoritySources {
    pub(crate) fn of(validation: &Validation) -> Self {
        Self {
            ca: validation.trusted_ca.clone(),
            crl: validation.crl.clone(),
            domains: validation.trust_domains.clone(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Where the authorities stand.
    pub(crate) fn first(&self) -> Option<&DataSource> {
        self.ca
            .as_ref()
            .or_else(|| self.domains.first().map(|(_, source)| source))
    }
}

/// What came from a [`Source`].
#[derive(Debug)]
pub(crate) enum Material {
    /// An identity of ours.
    Certificate(Identity),
    /// Who is believed; from SDS with conditions that come along.
    Validation {
        authorities: Authorities,
        rules: Option<Box<Validation>>,
    },
    /// What formats print.
    Text(Bytes),
}

/// Who is believed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Authorities {
    pub(crate) trust: Option<Arc<Trust>>,
    pub(crate) lists: Arc<[RevocationList]>,
    pub(crate) domains: Vec<(Box<str>, Arc<Trust>)>,
}

impl Material {
    /// Reads a certificate with its key.
    pub(crate) fn certificate(chain: &DataSource, key: &DataSource) -> Result<Self, String> {
        let chain = read(chain).map_err(|why| format!("certificate_chain: {why}"))?;
        let key = read(key).map_err(|why| format!("private_key: {why}"))?;
        let identity = Identity::from_pem(&chain, &key).map_err(|error| error.to_string())?;
        Ok(Self::Certificate(identity))
    }

    /// Reads authorities.
    pub(crate) fn authorities(sources: &AuthoritySources) -> Result<Self, String> {
        Ok(Self::Validation {
            authorities: Authorities::read(sources)?,
            rules: None,
        })
    }

    /// Reads a text that formats print.
    pub(crate) fn text(path: &Path) -> Result<Self, String> {
        let length = fs::metadata(path).map(|found| found.len());
        let length = length.map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        if length > LONGEST_TEXT as u64 {
            return Err(format!("{}: {TOO_LONG}", path.display()));
        }
        let text = limited(read(&DataSource::File(path.to_owned()))?);
        text.map(Self::Text)
            .map_err(|why| format!("{}: {why}", path.display()))
    }

    /// Reads what SDS or the bootstrap says under a name.
    pub(crate) fn secret(secret: &Secret) -> Result<Self, String> {
        match &secret.kind {
            SecretKind::Certificate { chain, key } => Self::certificate(chain, key),
            SecretKind::Generic(source) => {
                let text = limited(read(source)?);
                text.map(Self::Text).map_err(|why| format!("secret: {why}"))
            }
            SecretKind::Validation(rules) => Ok(Self::Validation {
                authorities: Authorities::read(&AuthoritySources::of(rules))?,
                rules: Some(Box::new(rules.clone())),
            }),
        }
    }
}

impl Authorities {
    fn read(sources: &AuthoritySources) -> Result<Self, String> {
        let trust = |name: &str, source: &DataSource| {
            let text = read(source).map_err(|why| format!("{name}: {why}"))?;
            Trust::from_pem(&text)
                .map(Arc::new)
                .map_err(|error| error.to_string())
        };
        let lists = match &sources.crl {
            None => Vec::new(),
            Some(source) => {
                let text = read(source).map_err(|why| format!("crl: {why}"))?;
                revocation_lists(&text).map_err(|error| error.to_string())?
            }
        };
        Ok(Self {
            trust: sources
                .ca
                .as_ref()
                .map(|source| trust("trusted_ca", source))
                .transpose()?,
            lists: lists.into(),
            domains: sources
                .domains
                .iter()
                .map(|(name, source)| Ok((Box::from(&**name), trust("trust_bundle", source)?)))
                .collect::<Result<_, String>>()?,
        })
    }
}

/// The files that a source is read from.
pub(crate) fn files(source: &Source, secret: Option<&Secret>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut add = |source: &DataSource| {
        if let DataSource::File(path) = source {
            found.push(path.clone());
        }
    };
    let mut authorities = |sources: &AuthoritySources| {
        sources.ca.iter().for_each(&mut add);
        sources.crl.iter().for_each(&mut add);
        sources.domains.iter().for_each(|(_, source)| add(source));
    };
    match (source, secret.map(|secret| &secret.kind)) {
        (Source::Certificate { chain, key }, _)
        | (Source::Sds(_), Some(SecretKind::Certificate { chain, key })) => {
            add(chain);
            add(key);
        }
        (Source::Authorities(sources), _) => authorities(sources),
        (Source::Sds(_), Some(SecretKind::Validation(rules))) => {
            authorities(&AuthoritySources::of(rules));
        }
        (Source::Text(path), _) => found.push(path.clone()),
        (Source::Sds(_), Some(SecretKind::Generic(source))) => add(source),
        (Source::Sds(_), None) => {}
    }
    found
}

fn limited(text: Vec<u8>) -> Result<Bytes, String> {
    match text.len() {
        0..=LONGEST_TEXT => Ok(text.into()),
        _ => Err(TOO_LONG.to_owned()),
    }
}

/// Bytes of a text that formats print, at most: each worker prints all of it with every line.
const LONGEST_TEXT: usize = 64 * 1024;
const TOO_LONG: &str = "has more than 64 KiB, which is more than a format may print";

fn read(source: &DataSource) -> Result<Vec<u8>, String> {
    match source {
        DataSource::Inline(bytes) => Ok(bytes.to_vec()),
        DataSource::File(path) => {
            fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
        }
        DataSource::Environment(name) => std::env::var(&**name)
            .map(String::into_bytes)
            .map_err(|error| format!("environment variable {name}: {error}")),
    }
}
