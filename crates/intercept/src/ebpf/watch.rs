//! What the guard knows of programs: which ones captured at its start, and how to attach them again.
//!
//! A link that is detached, unpinned or given another program captures no more, and nobody in the pod is told. The
//! programs themselves and their maps are kept open here, so that they can be attached and pinned again even where
//! somebody has removed everything; the links are not, since an open link would keep a removed one attached.

use std::{
    fs::{self, File},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use super::{
    Set, cgroup,
    programs::{Known, PROGRAMS, SK_MSG_VERDICT},
    report, store,
    store::Policy,
    sys,
};
use crate::{Error, guard::Finding};

/// The programs of the network namespace that the calling thread is in.
#[derive(Debug)]
pub(crate) struct Watch {
    set: Set,
    programs: Vec<Watched>,
    maps: Vec<(PathBuf, OwnedFd)>,
    policy: Policy,
    netns: File,
    inode: u64,
}

#[derive(Debug)]
struct Watched {
    known: &'static Known,
    /// The program, and the kernel's number of it.
    program: OwnedFd,
    id: u64,
    /// The number of the cgroup that it was attached to; none for the network namespace and for a map.
    group: Option<u64>,
}

/// What became of a program.
enum State {
    Attached,
    /// Its link, if there still is one.
    Lost(&'static str, String, Option<OwnedFd>),
}

impl Watch {
    /// Takes what captures here for good; none where no programs do.
    pub(crate) fn start() -> Result<Option<Watch>, Error> {
        let (netns, inode) = store::netns()?;
        let Some(set) = store::sets(inode).into_iter().find(Set::complete) else {
            return Ok(None);
        };
        let open = |id: u64| {
            sys::program(id as u32).map_err(|e| {
                Error::Ebpf(format!(
                    "program {id} cannot be opened: {e} (CAP_SYS_ADMIN is needed to guard programs)"
                ))
            })
        };
        let mut programs = Vec::new();
        for (name, link) in set.links() {
            let id = sys::field(&link, "prog_id").unwrap_or_default();
            let known = PROGRAMS.iter().find(|p| p.name == name);
            programs.extend(
                known
                    .map(|known| {
                        Ok::<_, Error>(Watched {
                            known,
                            program: open(id)?,
                            id,
                            group: sys::field(&link, "cgroup_id"),
                        })
                    })
                    .transpose()?,
            );
        }
        let (policy, _) = set.read()?;
        let verdict = PROGRAMS.iter().find(|p| p.hook == SK_MSG_VERDICT);
        if policy.accelerates()
            && let Some(known) = verdict
            && let Some(id) = verdict_of(&set)
        {
            programs.push(Watched {
                known,
                program: open(id)?,
                id,
                group: None,
            });
        }
        let maps = set
            .pinned_maps()
            .into_iter()
            .map(|path| {
                let map = sys::open_pin(&path)
                    .map_err(|e| Error::Ebpf(format!("{}: {e}", path.display())))?;
                Ok((path, map))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Some(Watch {
            set,
            programs,
            maps,
            policy,
            netns,
            inode,
        }))
    }

    /// What differs from the start.
    pub(crate) fn look(&self) -> Vec<Finding> {
        let finding = |kind, what| Finding {
            subject: "program",
            kind,
            what,
        };
        let mut out = Vec::new();
        for watched in &self.programs {
            if let State::Lost(kind, how, _) = self.state(watched) {
                let known = watched.known;
                let what = format!("{}, which {}: {how}", known.name, known.what);
                out.push(finding(kind, what));
            }
        }
        let lost = self.maps.iter().filter(|(path, _)| !path.exists());
        let lost: Vec<String> = lost.map(|(path, _)| path.display().to_string()).collect();
        if !lost.is_empty() {
            out.push(finding("deleted", format!("maps: {}", lost.join(", "))));
            return out;
        }
        match self.set.read() {
            Ok((policy, _)) if policy == self.policy => {}
            Ok((policy, _)) => {
                for difference in report::differences(&policy, &self.policy) {
                    out.push(finding(
                        "changed",
                        format!("rules of the programs: {difference}"),
                    ));
                }
            }
            Err(e) => out.push(finding("changed", format!("maps: {e}"))),
        }
        out
    }

    /// Attaches and pins again what was there at the start, and writes its rules. Where other programs of ours capture
    /// by now, those are what there is to guard: two at once would lead each connection to the proxy twice.
    pub(crate) fn repair(&mut self) -> Result<(), Error> {
        let others = store::sets(self.inode);
        if others.iter().any(|s| s.complete() && *s != self.set)
            && let Some(now) = Watch::start()?
        {
            *self = now;
            return Ok(());
        }
        let _locked = store::lock()?;
        let fail = |what: &Path, e: &dyn std::fmt::Display| {
            Error::Ebpf(format!("{} cannot be repaired: {e}", what.display()))
        };
        fs::create_dir_all(&self.set.folder).map_err(|e| fail(&self.set.folder, &e))?;
        for (path, map) in self.maps.iter().filter(|(path, _)| !path.exists()) {
            sys::pin(map, path).map_err(|e| fail(path, &e))?;
        }
        // In the order in which they were attached first: those that capture come last.
        for known in PROGRAMS {
            let Some(watched) = self.programs.iter().find(|w| w.known.name == known.name) else {
                continue;
            };
            if let State::Lost(_, _, link) = self.state(watched) {
                let path = self.set.folder.join(known.name);
                if let Some(link) = link {
                    let _ = sys::detach(&link);
                }
                let _ = fs::remove_file(&path);
                self.attach(watched, &path).map_err(|e| fail(&path, &e))?;
            }
        }
        if self.set.read()?.0 != self.policy {
            self.set.write(&self.policy)?;
        }
        Ok(())
    }

    fn attach(&self, watched: &Watched, path: &Path) -> Result<(), String> {
        let program = watched.program.as_fd();
        let text = |e: std::io::Error| e.to_string();
        let hook = watched.known.hook;
        if hook == SK_MSG_VERDICT {
            let pairs = sys::open_pin(&self.set.map_path("pairs")).map_err(text)?;
            return sys::attach(program, pairs.as_fd(), hook).map_err(text);
        }
        let link = match watched.group {
            None => sys::link(program, self.netns.as_fd(), hook),
            Some(id) => {
                let folder = cgroup::numbered(id)
                    .ok_or_else(|| format!("the cgroup {id} is gone, and the pod with it"))?;
                File::open(folder).and_then(|folder| sys::link(program, folder.as_fd(), hook))
            }
        };
        sys::pin(&link.map_err(text)?, path).map_err(text)
    }

    fn state(&self, watched: &Watched) -> State {
        let other = |id: u64| format!("program {id} runs in place of {}", watched.id);
        if watched.known.hook == SK_MSG_VERDICT {
            return match verdict_of(&self.set) {
                Some(id) if id == watched.id => State::Attached,
                Some(id) => State::Lost("replaced", other(id), None),
                None => State::Lost("detached", "it is not attached to its map".into(), None),
            };
        }
        let path = self.set.folder.join(watched.known.name);
        let Ok(link) = sys::open_pin(&path) else {
            let how = format!("its link {} is gone", path.display());
            return State::Lost("deleted", how, None);
        };
        if store::gone(&link) {
            let how = match watched.group {
                Some(id) => format!("it is not attached to cgroup {id}"),
                None => "it is not attached to the network namespace".into(),
            };
            return State::Lost("detached", how, Some(link));
        }
        match sys::field(&link, "prog_id") {
            Some(id) if id == watched.id => State::Attached,
            id => State::Lost("replaced", other(id.unwrap_or_default()), Some(link)),
        }
    }
}

/// The program that passes bytes on between the set's sockets.
fn verdict_of(set: &Set) -> Option<u64> {
    let pairs = sys::open_pin(&set.map_path("pairs")).ok()?;
    sys::attached(pairs.as_fd(), SK_MSG_VERDICT)
        .ok()?
        .map(u64::from)
}
