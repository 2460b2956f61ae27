//! `exec POD -- COMMAND`: a program of the user's inside a container.

use std::fs;

use crate::{
    error::{Doing, Error, Result},
    pod::run::{RunSpec, become_container},
    state::StateDir,
};

/// Becomes the command, as the container's user with its environment. Returns only where that fails.
pub(crate) fn exec(
    state: &StateDir,
    pod: &str,
    namespace: Option<&str>,
    container: Option<&str>,
    command: Vec<String>,
) -> Result<()> {
    let status = state.status()?;
    let pod = status.find(pod, namespace)?;
    let wanted = container.unwrap_or(&pod.default_container);
    let container = pod
        .containers
        .iter()
        .find(|c| c.name == wanted)
        .ok_or_else(|| {
            let names: Vec<_> = pod.containers.iter().map(|c| c.name.as_str()).collect();
            Error::Usage(format!(
                "pod {} has no container {wanted:?}; it has {}",
                pod.name,
                names.join(", ")
            ))
        })?;
    if container.pid == 0 {
        return Err(Error::Usage(format!(
            "container {wanted} of pod {} does not run ({}): see `outrigger local logs {} -c {wanted}`",
            pod.name,
            if container.last_exit.is_empty() {
                &container.state
            } else {
                &container.last_exit
            },
            pod.name,
        )));
    }
    let path = state
        .pod(&pod.namespace, &pod.name)
        .join(format!("{wanted}.run.json"));
    let bytes = fs::read(&path).doing(|| format!("read {}", path.display()))?;
    let spec: RunSpec = serde_json::from_slice(&bytes)
        .map_err(std::io::Error::from)
        .doing(|| format!("read {}", path.display()))?;
    let mut env = spec.env;
    // Of the user's own terminal, which is what the program talks to.
    if let Ok(terminal) = std::env::var("TERM") {
        env.push(("TERM".to_owned(), terminal));
    }
    become_container(&RunSpec {
        join_mounts: Some(container.pid),
        dies_with_parent: false,
        mounts: Vec::new(),
        args: command,
        directory: "/".to_owned(),
        env,
        ..spec
    })
}
