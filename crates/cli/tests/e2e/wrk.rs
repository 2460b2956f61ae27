//! Requests as fast as they can.

use std::process::{Child, Command, Stdio};

/// `wrk` against the gateway, until it is told to stop.
pub(crate) struct Wrk(Option<Child>);

impl Wrk {
    pub(crate) fn start(gateway: &str, path: &str, connections: u8) -> Self {
        let wrk = Command::new("wrk")
            .args(["-t", "1", "-d", "3600", "--timeout", "20", "-c"])
            .arg(connections.to_string())
            .arg(format!("http://{gateway}{path}"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("wrk runs (apt-get install wrk)");
        Self(Some(wrk))
    }

    /// Ends it; how many requests it made, of which none failed.
    pub(crate) fn stop(mut self) -> u64 {
        let wrk = self.0.take().expect("it is stopped once");
        signal("-INT", u64::from(wrk.id()));
        let output = wrk.wait_with_output().expect("wrk ends");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            !text.contains("Non-2xx") && !text.contains("Socket errors"),
            "{text}"
        );
        let requests = text.lines().find_map(|line| {
            let (count, rest) = line.trim().split_once(' ')?;
            rest.starts_with("requests in")
                .then(|| count.parse().ok())?
        });
        requests.unwrap_or_else(|| panic!("wrk says nothing of requests: {text}"))
    }
}

impl Drop for Wrk {
    fn drop(&mut self) {
        if let Some(wrk) = &mut self.0 {
            let _ = wrk.kill();
            let _ = wrk.wait();
        }
    }
}

pub(crate) fn signal(name: &str, pid: u64) {
    let done = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(done.expect("kill").success(), "no process {pid}");
}
