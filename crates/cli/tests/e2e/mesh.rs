//! One running mesh, and how the cases talk to it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

/// Why the live tests cannot run here, if they cannot.
pub(crate) fn cannot_run() -> Option<String> {
    let id = Command::new("id").arg("-u").output().ok()?;
    if id.stdout.trim_ascii() != b"0" {
        return Some("namespaces need root".to_owned());
    }
    ["ip", "iptables-restore", "nsenter", "wrk"]
        .iter()
        .find_map(|program| {
            let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
                .iter()
                .any(|d| Path::new(d).join(program).exists());
            (!found).then(|| format!("{program} is not installed"))
        })
}

/// A mesh of a folder of the tests, ended when dropped.
pub(crate) struct Mesh {
    program: PathBuf,
    /// A copy of the folder, which cases may edit.
    pub(crate) folder: tempfile::TempDir,
    state: tempfile::TempDir,
}

impl Mesh {
    /// Starts the mesh of a folder below `tests`, and waits until as many pods are ready.
    pub(crate) fn start(folder: &str, wanted: usize) -> Self {
        let program = env::var_os("OUTRIGGER_BIN")
            .map_or_else(|| env!("CARGO_BIN_EXE_outrigger").into(), PathBuf::from);
        let copy = tempfile::tempdir().expect("a folder for the YAML");
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let source = tests.join(folder);
        for file in fs::read_dir(&source).expect("the tests' YAML") {
            let file = file.expect("an entry").path();
            fs::copy(&file, copy.path().join(file.file_name().expect("a name")))
                .expect("copy the YAML");
        }
        let mesh = Self {
            program,
            folder: copy,
            state: tempfile::tempdir().expect("a state folder"),
        };
        let up = mesh.run(&[
            "local",
            "up",
            "--wait",
            "0",
            "-f",
            &mesh.folder.path().to_string_lossy(),
        ]);
        if !up.status.success() {
            mesh.explain();
            panic!(
                "the mesh did not come up: {}",
                String::from_utf8_lossy(&up.stderr)
            );
        }
        // All but the pod that is to be unready.
        let deadline = Instant::now() + Duration::from_secs(150);
        loop {
            let status = mesh.status();
            let pods = status["pods"].as_array().expect("pods");
            let waiting: Vec<_> = pods
                .iter()
                .filter(|p| p["ready"] != true && p["name"] != "half-unready")
                .collect();
            if pods.len() >= wanted && waiting.is_empty() {
                return mesh;
            }
            if Instant::now() > deadline {
                mesh.explain();
                panic!("these pods are not ready: {waiting:#?}");
            }
            sleep(Duration::from_millis(100));
        }
    }

    /// Runs the program with these arguments.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        Command::new(&self.program)
            .args(args)
            .env("OUTRIGGER_STATE", self.state())
            .output()
            .expect("the program starts")
    }

    /// What a command printed; panics where it fails.
    pub(crate) fn output(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Calls from a pod (`NAMESPACE/POD`) with `outrigger call`, and the result as data.
    pub(crate) fn call(&self, from: &str, args: &[&str]) -> Value {
        let (namespace, pod) = from.split_once('/').expect("namespace/pod");
        let mut all = vec![
            "local",
            "exec",
            "-n",
            namespace,
            pod,
            "--",
            "outrigger",
            "call",
        ];
        all.extend(args);
        let text = self.output(&all);
        serde_json::from_str(text.lines().next().unwrap_or(""))
            .unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
    }

    /// Everything known about the running mesh.
    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.output(&["local", "ps", "-o", "json"])).expect("ps prints JSON")
    }

    /// The address of a pod.
    pub(crate) fn address(&self, namespace: &str, name: &str) -> String {
        let status = self.status();
        let pods = status["pods"].as_array().expect("pods");
        let pod = pods
            .iter()
            .find(|p| p["name"] == name && p["namespace"] == namespace)
            .expect("the pod");
        pod["address"].as_str().expect("an address").to_owned()
    }

    pub(crate) fn log(&self, namespace: &str, pod: &str, container: &str) -> String {
        self.output(&["local", "logs", "-n", namespace, pod, "-c", container])
    }

    /// Where the mesh keeps what is its own.
    pub(crate) fn state(&self) -> PathBuf {
        self.state.path().join("mesh")
    }

    /// The process in whose network the bridge is.
    pub(crate) fn supervisor(&self) -> u64 {
        let text = fs::read(self.state().join("status.json")).expect("a status");
        let status: Value = serde_json::from_slice(&text).expect("JSON");
        status["supervisor"].as_u64().expect("a process")
    }

    /// Runs a command in a pod's network namespace, with the machine's files; its output.
    pub(crate) fn inside(&self, namespace: &str, pod: &str, script: &str) -> String {
        let status = self.status();
        let processes = status["processes"].as_array().expect("processes");
        let process = processes
            .iter()
            .find(|p| p["pod"] == pod && p["namespace"] == namespace)
            .expect("a process");
        let pid = process["pid"].to_string();
        let output = Command::new("nsenter")
            .args(["-n", "--target", &pid, "sh", "-c", script])
            .output()
            .expect("nsenter");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What helps to understand a failure.
    pub(crate) fn explain(&self) {
        let print = |args: &[&str]| {
            let output = self.run(args);
            eprintln!(
                "$ outrigger {}\n{}",
                args.join(" "),
                String::from_utf8_lossy(&output.stdout)
            );
        };
        print(&["local", "ps"]);
        print(&[
            "local",
            "logs",
            "-n",
            "istio-system",
            "istiod",
            "--tail",
            "15",
        ]);
        print(&[
            "local",
            "logs",
            "-n",
            "shop",
            "client",
            "-c",
            "istio-proxy",
            "--tail",
            "15",
        ]);
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        let down = self.run(&["local", "down"]);
        if !down.status.success() {
            eprintln!("down: {}", String::from_utf8_lossy(&down.stderr));
        }
    }
}

/// Asks until the answer is there, or a limit after which it is not coming.
pub(crate) fn eventually<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        sleep(Duration::from_millis(50));
    }
}
