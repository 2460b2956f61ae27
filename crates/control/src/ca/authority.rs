//! The authority: the key that signs now, the roots that are given out, and how one root follows another.
//!
//! A root of our own is replaced in three steps, none of which any peer has to notice. The next root is *introduced*:
//! it is given out beside the present one, which goes on signing. After the overlap, when everybody trusts both
//! ([`Holders`]), the authority has *switched*: the next root signs. When the last certificate of the former has ended
//! it is *dropped*.
//! Which step it is stands in the state folder, so that a restart goes on where it was. It begins by itself when a
//! fifth of the present root's life is left, or when the operator puts a file `rotate` into the folder.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base::{clock::Clock, spiffe::Identity};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    CaError, Csr, files,
    holders::Holders,
    signer::{DEFAULT_LIFETIME, LONGEST_LIFETIME, Signer, make_root},
};

/// How long a new root is given out at least before it signs, where the operator does not say.
pub const DEFAULT_OVERLAP: Duration = Duration::from_secs(3600);
/// The part of a root's life that is left when it is replaced.
const LEFT: u32 = 5;

const KEY: &str = "ca-key.pem";
const CERTIFICATE: &str = "ca-cert.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOT: &str = "root-cert.pem";
/// Which root signs, and which come and go.
const RECORD: &str = "authority.json";
/// The operator's wish for another root.
const WISH: &str = "rotate";

/// Where keys are kept.
#[derive(Debug, Clone)]
pub struct Files {
    /// Ours alone, for keys that are made here (`--stateDir`).
    pub state: PathBuf,
    /// A plugged-in authority, if the folder has one (`/etc/cacerts`).
    pub plugged: PathBuf,
}

/// Signs certificates.
pub struct Authority {
    place: Place,
    trust_domain: String,
    overlap: Duration,
    /// Other replicas sign with the same key: none of them replaces it alone.
    shared: bool,
    clock: Clock,
    signing: Mutex<Signing>,
    roots: watch::Sender<Arc<str>>,
}

/// Where the keys are of an authority.
#[derive(Debug)]
enum Place {
    /// Made here, and replaced here.
    Own(PathBuf),
    /// Somebody else's, who replaces them.
    Plugged(PathBuf),
}

struct Signing {
    signer: Arc<Signer>,
    record: Record,
    /// Who has certificates, and who of them has the next root.
    holders: Holders,
    /// When it was last said for whom a new root waits.
    told: Option<SystemTime>,
    /// What plugged-in files looked like when they were read.
    seen: Vec<Option<SystemTime>>,
}

/// How far a rotation is, as it is kept. Roots go by name: `NAME-key.pem`, `NAME-cert.pem`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Who signs.
    signer: String,
    /// Who will, and since when it is given out (seconds since 1970).
    next: Option<(String, u64)>,
    /// Who did, and until when its certificates are good.
    former: Option<(String, u64)>,
    /// How many roots there were.
    count: u64,
    /// The longest life that was asked for, in seconds.
    longest: u64,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            signer: "ca".to_owned(),
            next: None,
            former: None,
            count: 1,
            longest: 0,
        }
    }
}

impl std::fmt::Debug for Authority {
    /// Without its key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("place", &self.place)
            .field("overlap", &self.overlap)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// The plugged-in authority, else the one in the state folder, which is made at the first start.
    pub fn open(files: &Files, trust_domain: &str, clock: Clock) -> Result<Self, CaError> {
        let names = [KEY, CERTIFICATE, CHAIN, ROOT];
        let folder = &files.plugged;
        let missing = names.into_iter().filter(|n| !folder.join(n).exists());
        let missing: Vec<_> = missing.collect();
        let place = match missing.first() {
            None => Place::Plugged(folder.clone()),
            Some(_) if missing.len() == names.len() => Place::Own(files.state.clone()),
            Some(missing) => {
                return Err(CaError::Incomplete {
                    folder: folder.clone(),
                    missing,
                });
            }
        };
        let (signing, roots) = match &place {
            Place::Plugged(folder) => {
                let seen = stamps(folder);
                let (signer, roots) = plugged(folder, &clock)?;
                let record = Record::default();
                (
                    Signing {
                        signer,
                        record,
                        holders: Holders::since(0),
                        told: None,
                        seen,
                    },
                    roots,
                )
            }
            Place::Own(folder) => {
                let record = open_record(folder, trust_domain, &clock)?;
                let signer = own(folder, &record.signer, &clock)?;
                let roots = bundle(folder, &record)?;
                let seen = Vec::new();
                let holders = Holders::since(match record.longest {
                    0 => 0,
                    _ => seconds(clock.now()),
                });
                (
                    Signing {
                        signer,
                        record,
                        holders,
                        told: None,
                        seen,
                    },
                    roots,
                )
            }
        };
        let authority = Self {
            place,
            trust_domain: trust_domain.to_owned(),
            overlap: DEFAULT_OVERLAP,
            shared: false,
            clock,
            signing: Mutex::new(signing),
            roots: watch::Sender::new("".into()),
        };
        match &authority.place {
            Place::Own(folder) => authority.give_out(folder, roots)?,
            Place::Plugged(_) => _ = authority.roots.send_replace(roots.into()),
        }
        Ok(authority)
    }

    /// How long a new root is given out at least before it signs.
    pub fn with_overlap(mut self, overlap: Duration) -> Self {
        self.overlap = overlap;
        self
    }

    /// Says that other replicas have the same key. It is not replaced here then: plug in the next one for all of them.
    pub fn with_replicas(mut self, shared: bool) -> Self {
        self.shared = shared;
        self
    }

    /// The roots that peers are to trust, PEM.
    pub fn roots(&self) -> Arc<str> {
        self.roots.borrow().clone()
    }

    /// Tells whenever the roots, or who signs, have changed.
    pub fn changes(&self) -> watch::Receiver<Arc<str>> {
        self.roots.subscribe()
    }

    /// When the certificate ends that is signed with.
    pub fn not_after(&self) -> SystemTime {
        self.signing.lock().signer.not_after
    }

    /// Signs the key of a request for `identity`: the leaf, what is between, and the roots. `from` tells those who share
    /// an identity apart.
    ///
    /// `lifetime` zero is the default; a certificate never outlives the authority.
    pub fn sign(
        &self,
        identity: &Identity,
        from: Option<IpAddr>,
        csr: &Csr,
        lifetime: Duration,
    ) -> Result<Vec<String>, CaError> {
        // Before it is signed: no root may be dropped in between.
        let asked = self.remember(lifetime.min(LONGEST_LIFETIME))?;
        let mut signer = self.signing.lock().signer.clone();
        loop {
            let mut out = signer.sign(identity, csr, lifetime)?;
            let mut signing = self.signing.lock();
            // A certificate of a root that gave way meanwhile might outlive the trust in it.
            if !Arc::ptr_eq(&signer, &signing.signer) {
                signer = signing.signer.clone();
                continue;
            }
            let now = seconds(self.clock.now());
            let holder = (identity.clone(), from);
            signing
                .holders
                .given(holder, now.saturating_add(asked), now);
            // Under the lock: who is noted as having the next root has it in the answer.
            out.push(self.roots().to_string());
            return Ok(out);
        }
    }

    /// A certificate and key of ours for these DNS names, PEM: for the ports that proxies and the API server call.
    pub fn serve(&self, names: &[String]) -> Result<(String, String), CaError> {
        let signer = self.signing.lock().signer.clone();
        signer.serve(names)
    }

    /// Does what is due now: a step of a rotation, or reading plugged-in files that were replaced.
    pub fn turn(&self) -> Result<(), CaError> {
        match &self.place {
            Place::Own(folder) if self.shared => self.ask_for_next(folder),
            Place::Own(folder) => self.rotate(folder),
            Place::Plugged(folder) => self.reload(folder),
        }
    }

    /// Says what the operator has to do: to the wish, and every hour as soon as the root ages.
    fn ask_for_next(&self, folder: &Path) -> Result<(), CaError> {
        let wished = self.wished(folder);
        if wished {
            files::remove(&folder.join(WISH))?;
        }
        let now = self.clock.now();
        let mut signing = self.signing.lock();
        let told = signing.told.map(|told| now.duration_since(told));
        let is_told = told.is_some_and(|passed| passed.is_ok_and(|p| p < DEFAULT_OVERLAP));
        if wished || (is_aging(&signing.signer, now) && !is_told) {
            signing.told = Some(now);
            let left = signing.signer.not_after.duration_since(now);
            warn!(
                "certificate authority: other replicas have this key, too, and it ends in {} days: put the next one \
                 into --caCertsDir of all, its root beside the present one",
                left.unwrap_or_default().as_secs() / (24 * 3600)
            );
        }
        Ok(())
    }

    fn rotate(&self, folder: &Path) -> Result<(), CaError> {
        let now = self.clock.now();
        let mut signing = self.signing.lock();
        let mut record = signing.record.clone();
        let what = if let Some((name, until)) = record.former.clone() {
            if seconds(now) < until {
                return Ok(());
            }
            record.former = None;
            format!("root {name} is dropped: the last of its certificates has ended")
        } else if let Some((name, since)) = record.next.clone() {
            let longest = record.longest.max(1);
            let overlaps = seconds(now) < since.saturating_add(self.overlap.as_secs());
            if overlaps {
                return Ok(());
            }
            if signing.holders.lack(since, longest, seconds(now)) {
                tell_of_waiting(&mut signing, &name, since.saturating_add(longest), now);
                return Ok(());
            }
            let until = seconds(now).saturating_add(longest);
            let former = std::mem::replace(&mut record.signer, name.clone());
            record.former = Some((former.clone(), until));
            record.next = None;
            signing.signer = own(folder, &name, &self.clock)?;
            format!("root {name} signs from now on; {former} is dropped in {longest} s")
        } else if self.wished(folder) || is_aging(&signing.signer, now) {
            record.count += 1;
            let name = format!("ca-{}", record.count);
            write_root(folder, &name, &self.trust_domain, &self.clock)?;
            record.next = Some((name.clone(), seconds(now)));
            format!(
                "root {name} is given out; it signs when all have it, in {:?} at the earliest and {} s at the latest",
                self.overlap,
                record.longest.max(self.overlap.as_secs())
            )
        } else {
            return Ok(());
        };
        write_record(folder, &record)?;
        // The wish is fulfilled, the key that signs no more is not needed; only now, so that a crash loses nothing.
        files::remove(&folder.join(WISH))?;
        if let Some((name, _)) = &record.former {
            files::remove(&key_of(folder, name))?;
        }
        let dropped = signing.record.former.iter().map(|(name, _)| name);
        for name in dropped.filter(|_| record.former.is_none()) {
            files::remove(&certificate_of(folder, name))?;
        }
        let introduced = signing.record.next.is_none() && record.next.is_some();
        signing.record = record;
        let roots = bundle(folder, &signing.record)?;
        self.give_out(folder, roots)?;
        if introduced {
            signing.holders.introduce();
            signing.told = None;
        }
        drop(signing);
        info!("certificate authority: {what}");
        Ok(())
    }

    fn wished(&self, folder: &Path) -> bool {
        folder.join(WISH).exists()
    }

    /// A new root must come beside the old one first, or every peer would refuse every other.
    fn reload(&self, folder: &Path) -> Result<(), CaError> {
        let seen = stamps(folder);
        let mut signing = self.signing.lock();
        if signing.seen == seen {
            return Ok(());
        }
        signing.seen = seen;
        let (signer, roots) = plugged(folder, &self.clock)?;
        let before = self.roots();
        let kept = roots_of(&before)
            .iter()
            .any(|r| roots_of(&roots).contains(r));
        if !kept {
            warn!(
                "{}: none of the roots that are trusted now is in it: the new authority is not used. Put the old roots \
                 beside the new ones first",
                folder.join(ROOT).display()
            );
            return Ok(());
        }
        signing.signer = signer;
        drop(signing);
        info!("certificate authority: {} is read anew", folder.display());
        self.roots.send_replace(roots.into());
        Ok(())
    }

    /// Gives the roots to who listens, and to who reads them from the state folder.
    fn give_out(&self, folder: &Path, roots: String) -> Result<(), CaError> {
        files::folder(folder)?;
        let path = folder.join(ROOT);
        if fs::read_to_string(&path).ok().as_deref() != Some(&roots) {
            files::write(&path, roots.as_bytes(), 0o644)?;
        }
        self.roots.send_replace(roots.into());
        Ok(())
    }

    /// A root that is replaced is trusted as long as anybody may have a certificate of it. Gives the life in seconds.
    fn remember(&self, lifetime: Duration) -> Result<u64, CaError> {
        let asked = match lifetime {
            Duration::ZERO => DEFAULT_LIFETIME.as_secs(),
            asked => asked.as_secs(),
        };
        let mut signing = self.signing.lock();
        if asked > signing.record.longest {
            signing.record.longest = asked;
            if let Place::Own(folder) = &self.place {
                write_record(folder, &signing.record)?;
            }
        }
        Ok(asked)
    }
}

/// Says for whom a root waits: at once, and then every hour.
fn tell_of_waiting(signing: &mut Signing, name: &str, latest: u64, now: SystemTime) {
    let told = signing.told.map(|told| now.duration_since(told));
    if told.is_some_and(|passed| passed.is_ok_and(|passed| passed < DEFAULT_OVERLAP)) {
        return;
    }
    signing.told = Some(now);
    let left = latest.saturating_sub(seconds(now));
    match signing.holders.lacking(seconds(now)) {
        Some((count, (identity, from))) => warn!(
            "certificate authority: root {name} does not sign yet: {count} workloads have not come for it since it was \
             introduced, one of them {identity} at {}; their certificates end in {left} s at the latest",
            from.map_or_else(|| "an unknown address".to_owned(), |from| from.to_string())
        ),
        None => warn!(
            "certificate authority: root {name} does not sign yet: who has certificates was forgotten with the last \
             start; all of them end in {left} s at the latest"
        ),
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// Whether less than a fifth of its life is left.
fn is_aging(signer: &Signer, now: SystemTime) -> bool {
    let life = signer.not_after.duration_since(signer.not_before);
    let left = signer.not_after.duration_since(now);
    left.unwrap_or_default() < life.unwrap_or_default() / LEFT
}

fn key_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}-key.pem"))
}

fn certificate_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}-cert.pem"))
}

fn own(folder: &Path, name: &str, clock: &Clock) -> Result<Arc<Signer>, CaError> {
    let key = key_of(folder, name);
    files::private(&key)?;
    let signer = Signer::load(
        &key,
        &certificate_of(folder, name),
        Vec::new(),
        clock.clone(),
    )?;
    Ok(Arc::new(signer))
}

/// What stands in the folder; the first root is made where nothing does.
fn open_record(folder: &Path, trust_domain: &str, clock: &Clock) -> Result<Record, CaError> {
    let path = folder.join(RECORD);
    if path.exists() {
        let text = files::read(&path)?;
        return serde_json::from_str(&text).map_err(|e| CaError::Pem {
            path,
            problem: format!("not the authority's record: {e}"),
        });
    }
    let record = Record::default();
    if !key_of(folder, &record.signer).exists() {
        files::folder(folder)?;
        write_root(folder, &record.signer, trust_domain, clock)?;
    }
    Ok(record)
}

fn write_record(folder: &Path, record: &Record) -> Result<(), CaError> {
    let text = serde_json::to_string_pretty(record).map_err(|e| CaError::Sign(e.to_string()))?;
    files::write(&folder.join(RECORD), text.as_bytes(), 0o600)
}

/// Its key is written last: it is what the next start looks for.
fn write_root(folder: &Path, name: &str, trust_domain: &str, clock: &Clock) -> Result<(), CaError> {
    let (certificate, key) = make_root(trust_domain, clock)?;
    files::write(&certificate_of(folder, name), certificate.as_bytes(), 0o644)?;
    files::write(&key_of(folder, name), key.as_bytes(), 0o600)
}

/// All that peers are to trust: who signs, who will, who did.
fn bundle(folder: &Path, record: &Record) -> Result<String, CaError> {
    let others = [&record.next, &record.former];
    let others = others.into_iter().flatten().map(|(name, _)| name);
    std::iter::once(&record.signer)
        .chain(others)
        .map(|name| files::read(&certificate_of(folder, name)))
        .collect()
}

fn plugged(folder: &Path, clock: &Clock) -> Result<(Arc<Signer>, String), CaError> {
    let chain = files::certificates(&folder.join(CHAIN))?;
    let roots = files::read(&folder.join(ROOT))?;
    let (key, certificate) = (folder.join(KEY), folder.join(CERTIFICATE));
    let signer = Signer::load(&key, &certificate, chain, clock.clone())?;
    Ok((Arc::new(signer), roots))
}

fn stamps(folder: &Path) -> Vec<Option<SystemTime>> {
    [KEY, CERTIFICATE, CHAIN, ROOT]
        .map(|name| {
            let found = fs::metadata(folder.join(name));
            found.and_then(|m| m.modified()).ok()
        })
        .to_vec()
}

/// The certificates of a bundle, without what stands between them.
fn roots_of(bundle: &str) -> Vec<Vec<u8>> {
    use rustls_pki_types::{CertificateDer, pem::PemObject};
    CertificateDer::pem_slice_iter(bundle.as_bytes())
        .filter_map(|der| Some(der.ok()?.to_vec()))
        .collect()
}
