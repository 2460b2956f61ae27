//! `logs POD [-c CONTAINER]`: what a container printed.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    thread::sleep,
    time::Duration,
};

use crate::{
    error::{Doing, Error, Result},
    state::{PodStatus, StateDir},
};

/// What of a log is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    /// The last lines only.
    pub(crate) tail: Option<usize>,
    /// New lines as they come, until the user has enough.
    pub(crate) follow: bool,
    /// Of the process before the current one.
    pub(crate) previous: bool,
}

/// Prints the log of a container, of the pod's default one where none is named.
pub(crate) fn logs(
    state: &StateDir,
    pod: &str,
    namespace: Option<&str>,
    container: Option<&str>,
    view: View,
) -> Result<()> {
    let status = state.status()?;
    let pod = status.find(pod, namespace)?;
    let container = container.unwrap_or(&pod.default_container);
    if !pod.containers.iter().any(|c| c.name == container) {
        return Err(Error::Usage(format!(
            "pod {} has no container {container:?}; it has {}",
            pod.name,
            names(pod)
        )));
    }
    let end = if view.previous { "previous.log" } else { "log" };
    let path = state
        .pod(&pod.namespace, &pod.name)
        .join(format!("{container}.{end}"));
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(Error::Usage(format!(
                "container {container} of pod {} has {} log",
                pod.name,
                if view.previous {
                    "no previous"
                } else {
                    "not started: there is no"
                },
            )));
        }
        Err(e) => return Err(e).doing(|| format!("read {}", path.display())),
    };
    let mut text = Vec::new();
    file.read_to_end(&mut text)
        .doing(|| format!("read {}", path.display()))?;
    let start = view.tail.map_or(0, |n| tail_start(&text, n));
    let mut out = io::stdout().lock();
    // A reader that has seen enough (`| head`) is no error.
    if out
        .write_all(&text[start..])
        .and_then(|()| out.flush())
        .is_err()
        || !view.follow
    {
        return Ok(());
    }
    loop {
        sleep(Duration::from_millis(200));
        let length = file.metadata().map_or(0, |m| m.len());
        let at = file.stream_position().unwrap_or(0);
        // The container was restarted, or its log set aside: go on with the new file.
        if let Ok(new) = File::open(&path) {
            use std::os::unix::fs::MetadataExt;
            let inode = |f: &File| f.metadata().map_or(0, |m| m.ino());
            if inode(&new) != inode(&file) && length <= at {
                file = new;
            }
        }
        if length < at {
            let _ = file.seek(SeekFrom::Start(0));
        }
        let mut more = Vec::new();
        file.read_to_end(&mut more)
            .doing(|| format!("read {}", path.display()))?;
        if out.write_all(&more).and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
    }
}

fn names(pod: &PodStatus) -> String {
    pod.containers
        .iter()
        .map(|c| c.name.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

/// Where the last `n` lines start.
fn tail_start(text: &[u8], n: usize) -> usize {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let breaks = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, b)| **b == b'\n')
        .map(|(i, _)| i);
    match n {
        0 => text.len(),
        n => breaks.skip(n - 1).map(|i| i + 1).next().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        let text = b"a\nb\nc\n";
        assert_eq!(&text[tail_start(text, 2)..], b"b\nc\n");
        assert_eq!(&text[tail_start(text, 9)..], text);
        assert_eq!(&text[tail_start(text, 0)..], b"");
        assert_eq!(tail_start(b"", 3), 0);
    }
}
