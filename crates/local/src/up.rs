//! `up` and `down`: the mesh begins and ends.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};

use crate::{
    error::{Doing, Error, Result},
    pod::{
        image::Images,
        root::{MARKER, directory},
    },
    state::{StateDir, Status, process_start, processes},
};

/// Starts a mesh of a folder and waits until its pods are ready.
pub(crate) fn up(folder: &Path, state: &StateDir, images: &[String], wait: Duration) -> Result<()> {
    if !Uid::effective().is_root() {
        return Err(Error::Usage(
            "namespaces and mounts need root: run this as root (sudo)".to_owned(),
        ));
    }
    let folder = fs::canonicalize(folder).doing(|| format!("find {}", folder.display()))?;
    let mut known = Images::default();
    for image in images {
        known.add(image).map_err(Error::Usage)?;
    }
    if let Ok(status) = state.status() {
        if is_alive(&status) {
            return Err(Error::Usage(format!(
                "a mesh runs in {} already: `outrigger local down` ends it, --state DIR starts another",
                state.root().display()
            )));
        }
        clean_up(state)?;
    }
    for program in ["ip", "iptables-restore"] {
        let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
            .iter()
            .any(|d| Path::new(d).join(program).exists());
        if !found {
            return Err(Error::Usage(format!(
                "{program} is missing (Debian: apt-get install iproute2 iptables)"
            )));
        }
    }
    directory(state.root(), 0o755)?;
    let log = fs::File::create(state.supervisor_log())
        .doing(|| "make the supervisor's log".to_owned())?;
    let second = log
        .try_clone()
        .doing(|| "make the supervisor's log".to_owned())?;
    let own = std::env::current_exe().doing(|| "find this program".to_owned())?;
    let mut command = Command::new(&own);
    command
        .args(["local", "supervise", "-f"])
        .arg(&folder)
        .arg("--state")
        .arg(state.root());
    for image in images {
        command.arg("--image").arg(image);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(second)
        .spawn()
        .doing(|| format!("start {}", own.display()))?;
    // Even who does not wait for pods waits until the mesh can be asked.
    let deadline = Instant::now() + wait.max(Duration::from_secs(10));
    loop {
        if let Some(status) = child
            .try_wait()
            .doing(|| "look after the supervisor".to_owned())?
        {
            let log = fs::read_to_string(state.supervisor_log()).unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(5).collect();
            let last = last.into_iter().rev().collect::<Vec<_>>().join("\n");
            // What it left must not stand in the way of the next attempt.
            clean_up(state)?;
            return Err(Error::Usage(format!(
                "the mesh did not start ({status}):\n{last}"
            )));
        }
        let status = state
            .status()
            .ok()
            .filter(|s| s.supervisor == child.id() as i32);
        if status.as_ref().is_some_and(|s| s.settled) || (wait.is_zero() && status.is_some()) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let slow = status.map(|s| waiting_for(&s)).unwrap_or_default();
            return Err(Error::Usage(format!(
                "after {} s these pods are not ready (the mesh goes on; see `outrigger local ps` and `logs`):\n{slow}",
                wait.as_secs()
            )));
        }
        sleep(Duration::from_millis(50));
    }
}

fn waiting_for(status: &Status) -> String {
    status
        .pods
        .iter()
        .filter(|p| !p.ready && p.phase != "Succeeded")
        .map(|p| format!("  {}.{}: {} {}\n", p.name, p.namespace, p.phase, p.reason))
        .collect()
}

pub(crate) fn is_alive(status: &Status) -> bool {
    process_start(status.supervisor) == Some(status.supervisor_start)
}

/// Ends the mesh and removes everything that it made.
pub(crate) fn down(state: &StateDir) -> Result<()> {
    let status = match state.status() {
        Ok(status) => status,
        // Nothing runs, but a mesh that never got far may have left its folder.
        Err(e) => {
            return if state.supervisor_log().exists() {
                clean_up(state)
            } else {
                Err(e)
            };
        }
    };
    let supervisor = Pid::from_raw(status.supervisor);
    if is_alive(&status) {
        kill(supervisor, Signal::SIGTERM).doing(|| format!("end process {supervisor}"))?;
        let deadline = Instant::now() + Duration::from_secs(12);
        while is_alive(&status) && Instant::now() < deadline {
            sleep(Duration::from_millis(20));
        }
        if is_alive(&status) {
            kill(supervisor, Signal::SIGKILL).doing(|| format!("kill process {supervisor}"))?;
        }
    }
    // Usually there is nobody left: every process of a pod dies with the supervisor.
    let deadline = Instant::now() + Duration::from_secs(5);
    while kill_left_over(state) > 0 && Instant::now() < deadline {
        sleep(Duration::from_millis(20));
    }
    clean_up(state)
}

/// Kills processes that still run in this mesh's pods; returns how many there were. Numbers of namespaces are used again
/// by the kernel, so a process is known by what stands in its root file system.
fn kill_left_over(state: &StateDir) -> usize {
    let bin = state.bin();
    let ours = |pid: &i32| {
        let marker = format!("/proc/{pid}/root{MARKER}");
        fs::read(marker).is_ok_and(|text| text == bin.as_os_str().as_encoded_bytes())
    };
    let left: Vec<i32> = processes().into_iter().filter(ours).collect();
    for pid in &left {
        // It may have ended by itself meanwhile.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    left.len()
}

/// Removes what a mesh writes below its state folder, and the folder where nothing else is in it.
fn clean_up(state: &StateDir) -> Result<()> {
    let root = state.root();
    let pods = root.join("pods");
    let gone = |result: io::Result<()>, path: &Path| match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).doing(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    };
    // The keys of its authority are worth something as long as the mesh runs, and go with it.
    let own = [state.authority(), state.token_keys()];
    for folder in [state.config(), state.bin(), pods].into_iter().chain(own) {
        gone(fs::remove_dir_all(&folder), &folder)?;
    }
    let mut files = vec![state.status_file(), state.supervisor_log()];
    files.push(root.join(".status.json.tmp"));
    for file in files {
        gone(fs::remove_file(&file), &file)?;
    }
    // Only empty folders go; the user may keep other things beside.
    let parent: Option<PathBuf> = root.parent().map(Path::to_owned);
    if fs::remove_dir(root).is_ok() && parent.as_deref() == Some(Path::new("/run/outrigger")) {
        let _ = fs::remove_dir("/run/outrigger");
    }
    Ok(())
}
