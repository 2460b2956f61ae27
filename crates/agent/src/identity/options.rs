//! What the environment says of the workload's certificate, with the names of Istio's agent.

use std::{env, path::PathBuf, time::Duration};

use base::{clock::Clock, spiffe::Identity};
use tls::request::KeyKind;

use super::rotation::Policy;
use crate::{
    AgentError,
    bootstrap::{FILES_SOCKET, workload_socket},
    control_plane::{ControlPlane, Secure},
    settings::{Settings, duration},
};

/// Where certificates come from, and where they go.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who signs.
    pub source: Source,
    /// Kind of the key.
    pub key: KeyKind,
    /// When a certificate is replaced.
    pub policy: Policy,
    /// Life that is asked for (`SECRET_TTL`).
    pub lifetime: Duration,
    /// Folder to write certificates to (`OUTPUT_CERTS`).
    pub output: Option<PathBuf>,
    /// Roots that are trusted besides those of the authority's answer.
    pub roots: PathBuf,
    /// Socket of the secret service.
    pub socket: PathBuf,
    /// The socket is another's (SPIRE's): it must be there.
    pub foreign_socket: bool,
    /// Where files are served while another serves `socket`.
    pub files_socket: PathBuf,
    /// Whether a certificate is needed before anybody has asked for one.
    pub eager: bool,
    /// Whose time counts.
    pub clock: Clock,
}

/// Who makes the workload's certificate.
#[derive(Debug, Clone)]
pub enum Source {
    /// The mesh's authority, for this identity.
    Authority {
        /// Where it is.
        control_plane: Box<ControlPlane>,
        /// Whose certificate is asked for.
        identity: Identity,
    },
    /// Somebody else, who mounts it here.
    Files(Mounted),
}

/// A mounted certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Chain, leaf first.
    pub chain: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The roots of peers.
    pub roots: PathBuf,
}

impl Mounted {
    fn all_there(&self) -> bool {
        [&self.chain, &self.key, &self.roots]
            .iter()
            .all(|path| path.exists())
    }
}

impl Options {
    /// Reads the environment.
    ///
    /// # Errors
    /// Which variable is wrong, and what it can be.
    pub fn read(
        settings: &Settings,
        headers: &[(String, String)],
        clock: Clock,
    ) -> Result<Self, AgentError> {
        let output = text("OUTPUT_CERTS").map(PathBuf::from);
        let socket = workload_socket();
        Ok(Self {
            source: source(settings, headers, &clock)?,
            key: key()?,
            policy: Policy {
                ratio: fraction("SECRET_GRACE_PERIOD_RATIO", 0.5)?,
                jitter: fraction("SECRET_GRACE_PERIOD_RATIO_JITTER", 0.01)?,
            },
            lifetime: time("SECRET_TTL", Duration::from_secs(24 * 3600))?,
            eager: !settings.plaintext || output.is_some(),
            output,
            roots: match text("CA_ROOT_CA") {
                Some(path) if path != "SYSTEM" => path.into(),
                _ => crate::control_plane::ROOT.into(),
            },
            foreign_socket: !socket.ends_with("socket"),
            socket,
            files_socket: FILES_SOCKET.into(),
            clock,
        })
    }
}

fn source(
    settings: &Settings,
    headers: &[(String, String)],
    clock: &Clock,
) -> Result<Source, AgentError> {
    let files = |folder: &str, [chain, key, roots]: [&str; 3]| {
        let folder = PathBuf::from(folder);
        Mounted {
            chain: folder.join(chain),
            key: folder.join(key),
            roots: folder.join(roots),
        }
    };
    if switch("FILE_MOUNTED_CERTS")? {
        let names = ["cert-chain.pem", "key.pem", "root-cert.pem"];
        return Ok(Source::Files(files("/etc/certs", names)));
    }
    let mounted = files(
        "/var/run/secrets/workload-spiffe-credentials",
        ["certificates.pem", "private_key.pem", "ca_certificates.pem"],
    );
    if mounted.all_there() {
        return Ok(Source::Files(mounted));
    }
    let address = text("CA_ADDR").unwrap_or_else(|| match settings.plaintext {
        true => "istiod.istio-system.svc:15012".to_owned(),
        false => settings.discovery_address.clone(),
    });
    let mut all = headers.to_vec();
    all.extend(env::vars().filter_map(|(key, value)| {
        let name = key.strip_prefix("CA_HEADER_")?;
        Some((name.to_owned(), value))
    }));
    let control_plane = ControlPlane::secure(&address, Secure::read("CA_ROOT_CA", clock.clone()))
        .with_headers(&all)?;
    let trust_domain = text("TRUST_DOMAIN").unwrap_or_else(|| "cluster.local".to_owned());
    let account = text("SERVICE_ACCOUNT").unwrap_or_else(|| "default".to_owned());
    let identity = Identity::new(trust_domain, settings.namespace.clone(), account)
        .map_err(|e| AgentError::Config(format!("TRUST_DOMAIN, SERVICE_ACCOUNT: {e}")))?;
    Ok(Source::Authority {
        control_plane: Box::new(control_plane),
        identity,
    })
}

fn key() -> Result<KeyKind, AgentError> {
    let wrong = |name: &str, value: &str, right: &str| {
        AgentError::Config(format!(
            "environment variable {name}: {value:?} is not {right}"
        ))
    };
    match text("ECC_SIGNATURE_ALGORITHM").as_deref() {
        Some("ECDSA") => {}
        Some("ED25519") => return Ok(KeyKind::Ed25519),
        Some(other) => {
            return Err(wrong("ECC_SIGNATURE_ALGORITHM", other, "ECDSA or ED25519"));
        }
        None => match text("WORKLOAD_RSA_KEY_SIZE").as_deref() {
            None => {}
            Some("2048") => return Ok(KeyKind::Rsa2048),
            Some("3072") => return Ok(KeyKind::Rsa3072),
            Some("4096") => return Ok(KeyKind::Rsa4096),
            Some(other) => {
                return Err(wrong("WORKLOAD_RSA_KEY_SIZE", other, "2048, 3072 or 4096"));
            }
        },
    }
    match text("ECC_CURVE").as_deref() {
        None | Some("P256") => Ok(KeyKind::EcdsaP256),
        Some("P384") => Ok(KeyKind::EcdsaP384),
        Some(other) => Err(wrong("ECC_CURVE", other, "P256 or P384")),
    }
}

fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|v| !v.is_empty())
}

fn switch(name: &str) -> Result<bool, AgentError> {
    match text(name).as_deref() {
        None | Some("false" | "0") => Ok(false),
        Some("true" | "1") => Ok(true),
        Some(other) => Err(AgentError::Config(format!(
            "environment variable {name}: {other:?} is not true or false"
        ))),
    }
}

fn fraction(name: &str, default: f64) -> Result<f64, AgentError> {
    let Some(given) = text(name) else {
        return Ok(default);
    };
    match given.parse() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err(AgentError::Config(format!(
            "environment variable {name}: {given:?} is not a number from 0 to 1"
        ))),
    }
}

fn time(name: &str, default: Duration) -> Result<Duration, AgentError> {
    let Some(given) = text(name) else {
        return Ok(default);
    };
    match duration(&given).filter(|d| d.as_secs() > 0) {
        Some(value) => Ok(value),
        None => Err(AgentError::Config(format!(
            "environment variable {name}: {given:?} is not a duration of a second or more, such as 24h0m0s"
        ))),
    }
}
