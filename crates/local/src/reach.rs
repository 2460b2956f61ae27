//! Reaching the pods of a running mesh from another command of this program.

use std::{
    fs::File,
    io,
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::{Error, state::StateDir};

/// The address on this machine that leads to the control plane's monitoring port (15014).
///
/// `state` is the mesh's state folder, `None` for the usual one.
pub fn control_plane(state: Option<PathBuf>) -> Result<SocketAddr, Error> {
    let status = StateDir::new(state).status()?;
    status
        .forwards
        .iter()
        .find(|f| f.service == "istiod" && f.port == 15014)
        .and_then(|f| f.host.parse().ok())
        .ok_or_else(|| {
            Error::Usage(
                "the mesh has no control plane that can be asked (service istiod, port 15014)"
                    .to_owned(),
            )
        })
}

/// Name and namespace of the pod that a user means (`reviews-v1`, `reviews-v1.default`, `deploy/NAME`).
pub fn find_pod(
    state: Option<PathBuf>,
    pod: &str,
    namespace: Option<&str>,
) -> Result<(String, String), Error> {
    let status = StateDir::new(state).status()?;
    let pod = status.find(pod, namespace)?;
    Ok((pod.name.clone(), pod.namespace.clone()))
}

/// Connects to a port of 127.0.0.1 inside a pod, such as the proxy's admin port (15000).
///
/// # Errors
/// Where no mesh runs, the pod does not, or nothing listens there.
pub fn dial(
    state: Option<PathBuf>,
    pod: &str,
    namespace: Option<&str>,
    port: u16,
) -> Result<TcpStream, Error> {
    let status = StateDir::new(state).status()?;
    let pod = status.find(pod, namespace)?;
    let what = format!(
        "connect to port {port} in pod {}.{}",
        pod.name, pod.namespace
    );
    if pod.holder == 0 {
        return Err(Error::Usage(format!(
            "{what}: the pod does not run ({})",
            pod.reason
        )));
    }
    let path = format!("/proc/{}/ns/net", pod.holder);
    // A thread of its own enters the namespace; the socket it makes stays there.
    let connect = move || -> io::Result<TcpStream> {
        setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
        TcpStream::connect(("127.0.0.1", port))
    };
    thread::spawn(connect)
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the connecting thread has failed")))
        .map_err(|source| Error::Io { what, source })
}
