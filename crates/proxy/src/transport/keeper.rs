//! The main thread's side: reads sources, follows files, forgets what nobody needs.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Material, Secrets, Source, context::sources, material::files};
use crate::plan::{
    Cluster, Listener,
    cluster::UpstreamTransport,
    format_sources::{self, TextSource},
    listener::DownstreamTransport,
    tls::{CertificateSource, CommonTls, SdsSecret, Secret},
};

/// Whose contexts need a source.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    Cluster(Arc<str>),
    Listener(Arc<str>),
}

/// What is read, for whom, and from which files.
#[derive(Debug, Default)]
pub(crate) struct Keeper {
    secrets: Arc<Secrets>,
    owners: BTreeMap<Owner, Vec<Source>>,
    /// The last good secret of each name, for those whose parts are files.
    delivered: HashMap<SdsSecret, Arc<Secret>>,
    watched: HashMap<Source, Vec<(PathBuf, Stamp)>>,
}

/// What tells one state of a file from another, symbolic links followed.
pub(crate) type Stamp = Option<(u64, u64, i64, i64, u64)>;

impl Keeper {
    pub(crate) fn new(secrets: Arc<Secrets>) -> Self {
        Self {
            secrets,
            ..Self::default()
        }
    }

    /// Reads what a cluster or listener needs and is not there.
    ///
    /// # Errors
    /// Which source cannot be read, and why: the new version of its owner is refused.
    pub(crate) fn require(&mut self, owner: Owner, needs: Vec<Source>) -> Result<(), String> {
        for source in &needs {
            if matches!(source, Source::Sds(_)) || self.secrets.find(source).is_some() {
                continue;
            }
            self.load(source)?;
        }
        match needs.is_empty() {
            true => self.owners.remove(&owner),
            false => self.owners.insert(owner, needs),
        };
        self.forget();
        Ok(())
    }

    /// The owner is gone.
    pub(crate) fn release(&mut self, owner: &Owner) {
        if self.owners.remove(owner).is_some() {
            self.forget();
        }
    }

    /// A secret as SDS or the bootstrap says it.
    ///
    /// # Errors
    /// Why it is refused; the former one stays.
    pub(crate) fn deliver(&mut self, name: SdsSecret, secret: Arc<Secret>) -> Result<(), String> {
        let material = Material::secret(&secret)?;
        let source = Source::Sds(name.clone());
        self.watch(&source, Some(&secret));
        self.secrets.put(source, Arc::new(material));
        self.delivered.insert(name, secret);
        Ok(())
    }

    /// The secret is gone.
    pub(crate) fn withdraw(&mut self, name: &SdsSecret) {
        let source = Source::Sds(name.clone());
        self.delivered.remove(name);
        self.watched.remove(&source);
        self.secrets.forget(&source);
    }

    /// Whether there is a file to look at.
    pub(crate) fn watches(&self) -> bool {
        !self.watched.is_empty()
    }

    /// Reads again what stands in files that have changed. Gives what happened: the files, and why they cannot be
    /// used where that is so (what was read before stays in use then).
    pub(crate) fn look(&mut self) -> Vec<(String, Result<(), String>)> {
        let changed: Vec<Source> = self
            .watched
            .iter()
            .filter(|(_, files)| files.iter().any(|(path, seen)| stamp(path) != *seen))
            .map(|(source, _)| source.clone())
            .collect();
        changed
            .into_iter()
            .map(|source| {
                let result = self.load(&source);
                if result.is_err() {
                    // Remembered as it is now: it is read again when it changes again.
                    let secret = self.delivered_for(&source);
                    self.watch(&source, secret.as_deref());
                }
                let names = self.watched.get(&source).map(|files| {
                    let names: Vec<_> = files
                        .iter()
                        .map(|(path, _)| path.display().to_string())
                        .collect();
                    names.join(", ")
                });
                (names.unwrap_or_default(), result)
            })
            .collect()
    }

    /// Everything that is in use, for `/certs`.
    pub(crate) fn materials(&self) -> Vec<(Source, Arc<Material>)> {
        let mut all: Vec<Source> = Vec::new();
        for source in self.owners.values().flatten() {
            if !all.contains(source) {
                all.push(source.clone());
            }
        }
        all.into_iter()
            .filter_map(|source| Some((source.clone(), self.secrets.find(&source)?)))
            .filter(|(_, material)| !matches!(**material, Material::Text(_)))
            .collect()
    }

    /// Whether the bootstrap has the secrets of its own that a listener's formats print.
    ///
    /// # Errors
    /// Which one it lacks.
    pub(crate) fn prints(&self, plan: &Listener) -> Result<(), String> {
        for secret in secrets_of_formats(plan).filter(|secret| secret.source.is_none()) {
            let found = self.secrets.find(&Source::Sds(secret.clone()));
            if !found.is_some_and(|found| matches!(*found, Material::Text(_))) {
                return Err(format!(
                    "`{}` is no generic secret of the bootstrap",
                    secret.name
                ));
            }
        }
        Ok(())
    }

    fn delivered_for(&self, source: &Source) -> Option<Arc<Secret>> {
        match source {
            Source::Sds(name) => self.delivered.get(name).cloned(),
            _ => None,
        }
    }

    fn load(&mut self, source: &Source) -> Result<(), String> {
        let secret = self.delivered_for(source);
        let material = match source {
            Source::Certificate { chain, key } => Material::certificate(chain, key)?,
            Source::Authorities(sources) => Material::authorities(sources)?,
            Source::Text(path) => Material::text(path)?,
            Source::Sds(_) => match &secret {
                Some(secret) => Material::secret(secret)?,
                None => return Ok(()),
            },
        };
        self.watch(source, secret.as_deref());
        self.secrets.put(source.clone(), Arc::new(material));
        Ok(())
    }

    fn watch(&mut self, source: &Source, secret: Option<&Secret>) {
        let found: Vec<_> = files(source, secret)
            .into_iter()
            .map(|path| {
                let stamp = stamp(&path);
                (path, stamp)
            })
            .collect();
        match found.is_empty() {
            true => self.watched.remove(source),
            false => self.watched.insert(source.clone(), found),
        };
    }

    /// What came from the configuration and nobody needs any more. Secrets of SDS go with [`Keeper::withdraw`].
    fn forget(&mut self) {
        let used = |source: &Source| self.owners.values().flatten().any(|used| used == source);
        let unused: Vec<Source> = self
            .secrets
            .sources()
            .into_iter()
            .filter(|source| !matches!(source, Source::Sds(_)) && !used(source))
            .collect();
        for source in unused {
            self.watched.remove(&source);
            self.secrets.forget(&source);
        }
    }
}

/// What a cluster's contexts need.
pub(crate) fn of_cluster(plan: &Cluster) -> Vec<Source> {
    let all = plan
        .transport_socket_matches
        .iter()
        .map(|m| &m.transport_socket)
        .chain([&plan.transport_socket]);
    all.flat_map(|transport| match transport.after_header().0 {
        UpstreamTransport::Tls(tls) => sources(&tls.common),
        _ => Vec::new(),
    })
    .collect()
}

/// What a listener's contexts and formats need.
pub(crate) fn of_listener(plan: &Listener) -> Vec<Source> {
    let chains = plan.filter_chains.iter().chain(&plan.default_filter_chain);
    chains
        .flat_map(|chain| match &chain.transport_socket {
            DownstreamTransport::Tls(tls) => sources(&tls.common),
            DownstreamTransport::RawBuffer => Vec::new(),
        })
        .chain(format_sources::of_listener(plan).into_iter().map(source_of))
        .collect()
}

/// Where the main thread reads what a format prints.
pub(super) fn source_of(text: &TextSource) -> Source {
    match text {
        TextSource::File(path) => Source::Text(path.clone()),
        TextSource::Secret(secret) => Source::Sds(secret.clone()),
    }
}

/// The secrets that a listener's contexts and formats need.
pub(crate) fn secrets_of_listener(plan: &Listener) -> impl Iterator<Item = &SdsSecret> {
    let chains = plan.filter_chains.iter().chain(&plan.default_filter_chain);
    chains
        .filter_map(|chain| match &chain.transport_socket {
            DownstreamTransport::Tls(tls) => Some(&tls.common),
            DownstreamTransport::RawBuffer => None,
        })
        .flat_map(secrets)
        .chain(secrets_of_formats(plan))
}

fn secrets_of_formats(plan: &Listener) -> impl Iterator<Item = &SdsSecret> {
    let texts = format_sources::of_listener(plan).into_iter();
    texts.filter_map(|text| match text {
        TextSource::Secret(secret) => Some(secret),
        TextSource::File(_) => None,
    })
}

fn secrets(common: &CommonTls) -> impl Iterator<Item = &SdsSecret> {
    let certificates = common.certificates.iter().filter_map(|c| match c {
        CertificateSource::Sds(secret) => Some(secret),
        CertificateSource::Inline { .. } => None,
    });
    certificates.chain(common.validation.iter().filter_map(|v| v.sds.as_ref()))
}

/// What a file looks like now; `None` where there is none.
pub(crate) fn stamp(path: &Path) -> Stamp {
    let found = fs::metadata(path).ok()?;
    Some((
        found.dev(),
        found.ino(),
        found.mtime(),
        found.mtime_nsec(),
        found.size(),
    ))
}
