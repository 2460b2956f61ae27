//! The plug-in as a container runtime starts it: environment, configuration on standard input, a pod's namespace.
//!
//! This binary is also the program under test: started with CNI_COMMAND set, it is the plug-in; with `istio-iptables`
//! as its first argument, that. Needs root, ip and iptables; what is missing fails where `CI` is set.

#[allow(unreachable_pub, reason = "it is a file of testkit")]
#[path = "../../testkit/src/bpffs.rs"]
mod bpffs;
#[allow(unreachable_pub, reason = "it is a file of testkit")]
#[path = "../../testkit/src/needs.rs"]
mod needs;

use std::{
    env, fs,
    io::{Read, Write},
    net::TcpListener,
    panic,
    path::Path,
    process::{Child, Command, ExitCode, Output, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

fn main() -> ExitCode {
    let mut args: Vec<_> = env::args_os().collect();
    if env::var_os("CNI_COMMAND").is_some() {
        args.truncate(1);
        return outrigger_cni::command::main(args);
    }
    if args.get(1).is_some_and(|a| a == "istio-iptables") {
        args.remove(0);
        return intercept::command::main(args);
    }
    if env::args().any(|a| a == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Err(why) = needs::root_and("the plug-in's", &["iptables-nft"]) {
        return needs::skipped(&why);
    }
    let filter: Vec<String> = env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let _restore = bpffs::Restore::later();
    let mut failed = 0;
    for (name, test) in TESTS {
        if !filter.is_empty() && !filter.iter().any(|f| name.contains(f.as_str())) {
            continue;
        }
        let outcome = panic::catch_unwind(test);
        failed += usize::from(outcome.is_err());
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word}");
    }
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

type Test = fn();

const TESTS: &[(&str, Test)] = &[
    ("version_lists_what_is_spoken", version),
    ("add_writes_what_istio_iptables_writes", add),
    ("add_takes_less_than_fifty_milliseconds", quick),
    (
        "pods_of_mode_tproxy_are_not_tracked_where_the_node_says_so",
        untracked,
    ),
    ("check_names_a_rule_that_is_gone", check),
    ("pods_of_others_and_del_touch_nothing", others),
    ("programs_come_and_go_with_the_pod", programs),
    ("the_api_is_asked_with_the_kubeconfig", kubernetes),
    ("mistakes_have_the_specifications_codes", mistakes),
];

/// A network namespace that lives as long as a sleeping process in it.
struct Namespace(Child);

impl Namespace {
    fn new() -> Namespace {
        let mut child = Command::new("unshare")
            .args(["-n", "sh", "-c"])
            .arg(
                "ip link set lo up; ip link add eth0 type veth peer name peer0; ip link set peer0 up; ip addr add 10.9.0.5/24 dev eth0; \
                 ip link set eth0 up; echo up; exec cat",
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare runs");
        let mut up = [0; 3];
        let out = child.stdout.as_mut().expect("a pipe");
        out.read_exact(&mut up).expect("the namespace is made");
        Namespace(child)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    fn sh(&self, script: &str) -> String {
        let net = format!("--net={}", self.path());
        let output = Command::new("nsenter")
            .args([&net, "sh", "-c", script])
            .env("RUN", env::current_exe().expect("a path"))
            .output()
            .expect("nsenter runs");
        assert!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn rules(&self) -> String {
        let all = self.sh("iptables-save -t nat; iptables-save -t mangle; iptables-save -t raw");
        let rules: Vec<&str> = all.lines().filter(|l| l.starts_with("-A")).collect();
        rules.join("\n")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pod(annotations: Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web-1", "namespace": "shop", "annotations": {"sidecar.istio.io/status": "{}"}},
        "spec": {"containers": [
            {"name": "app"},
            {"name": "istio-proxy", "args": ["proxy", "sidecar"], "securityContext": {"runAsUser": 1337, "runAsGroup": 1337}},
        ]},
    });
    for (key, value) in annotations.as_object().expect("an object") {
        pod["metadata"]["annotations"][key] = value.clone();
    }
    pod
}

/// A folder with one pod, and a configuration that names it.
fn folder(pod: &Value) -> (tempfile::TempDir, Value) {
    let dir = tempfile::tempdir().expect("a folder");
    fs::create_dir(dir.path().join("sub")).expect("it is writable");
    fs::write(dir.path().join("sub/pod.json"), pod.to_string()).expect("it is writable");
    fs::write(
        dir.path().join("other.yaml"),
        "kind: Service\nmetadata: {name: web-1}\n",
    )
    .expect("it is writable");
    let conf = json!({
        "cniVersion": "1.0.0", "name": "net", "type": "istio-cni",
        "outrigger_pods": dir.path(),
        "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.5/24"}], "dns": {}},
    });
    (dir, conf)
}

fn plugin(command: &str, netns: &str, conf: &Value) -> Output {
    let mut child = Command::new(env::current_exe().expect("a path"))
        .env("CNI_COMMAND", command)
        .env("CNI_NETNS", netns)
        .env("CNI_CONTAINERID", "c")
        .env("CNI_IFNAME", "eth0")
        .env(
            "CNI_ARGS",
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-1;K8S_POD_UID={}",
                *UID
            ),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut input = child.stdin.take().expect("a pipe");
    // A plug-in that ends early closes its input; its result tells why.
    let _ = input.write_all(conf.to_string().as_bytes());
    drop(input);
    child.wait_with_output().expect("it ends")
}

fn result(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

fn version() {
    let output = plugin("VERSION", "", &json!({}));
    let versions = &result(&output)["supportedVersions"];
    assert!(output.status.success() && versions.as_array().unwrap().contains(&json!("1.0.0")));
}

fn add() {
    for (annotations, flags) in [
        (
            json!({}),
            "-m REDIRECT -i '*' -b '*' -d 15020,15021,15090 -o 15020",
        ),
        (
            json!({
                "traffic.sidecar.istio.io/includeInboundPorts": "80,443",
                "traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.1.0.0/16",
                "traffic.sidecar.istio.io/excludeOutboundPorts": "3306",
                "traffic.sidecar.istio.io/excludeInterfaces": "eth7",
                "sidecar.istio.io/interceptionMode": "TPROXY",
            }),
            "-m TPROXY -i '*' -x 10.1.0.0/16 -b 80,443 -d 15020,15021,15090 -o 3306 -c eth7",
        ),
    ] {
        let (_dir, conf) = folder(&pod(annotations));
        let (ours, theirs) = (Namespace::new(), Namespace::new());
        let begun = Instant::now();
        let output = plugin("ADD", &ours.path(), &conf);
        let took = begun.elapsed();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        // The result of the plug-ins before goes on as it is.
        assert_eq!(result(&output), conf["prevResult"]);
        theirs.sh(&format!(
            "$RUN istio-iptables -u 1337 -g 1337 {flags} >/dev/null"
        ));
        assert_eq!(ours.rules(), theirs.rules());
        assert!(ours.rules().contains("ISTIO_OUTPUT"));
        println!("  ADD took {took:?}");
        // A runtime may ask again.
        assert!(plugin("ADD", &ours.path(), &conf).status.success());
        assert_eq!(ours.rules(), theirs.rules());
    }
}

/// The time from the plug-in's start to its end. The best of many counts, since the machine may have other things to do; the
/// first that is quick enough is enough.
fn quick() {
    const LIMIT: Duration = Duration::from_millis(50);
    let (_dir, conf) = folder(&pod(json!({})));
    let mut best = Duration::MAX;
    for _ in 0..100 {
        let pod = Namespace::new();
        let begun = Instant::now();
        let output = plugin("ADD", &pod.path(), &conf);
        best = best.min(begun.elapsed());
        assert!(output.status.success() && pod.rules().contains("ISTIO_OUTPUT"));
        if best < LIMIT {
            break;
        }
    }
    println!("  ADD took {best:?}");
    assert!(best < LIMIT, "{best:?}");
}

fn untracked() {
    for (mode, expected) in [("TPROXY", true), ("REDIRECT", false)] {
        let (_dir, mut conf) = folder(&pod(json!({"sidecar.istio.io/interceptionMode": mode})));
        conf["tproxy_notrack"] = true.into();
        let namespace = Namespace::new();
        let output = plugin("ADD", &namespace.path(), &conf);
        assert!(output.status.success(), "{}", result(&output));
        assert_eq!(namespace.rules().contains("--notrack"), expected, "{mode}");
        let accept = namespace.sh("cat /proc/sys/net/ipv4/tcp_fwmark_accept");
        assert_eq!(accept.trim() == "1", expected, "{mode}");
        let output = plugin("CHECK", &namespace.path(), &conf);
        assert!(output.status.success(), "{}", result(&output));
    }
}

/// The pod's uid, which its cgroup is found by; other runs of this test have others.
static UID: std::sync::LazyLock<String> =
    std::sync::LazyLock::new(|| format!("0c51-77-{}", std::process::id()));

/// A cgroup as kubelet makes it with systemd's driver.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn new() -> Cgroup {
        let mount = intercept::ebpf::cgroup_mount().expect("cgroup2");
        let above = mount.join(format!("outrigger-cni-test-{}.slice", std::process::id()));
        let uid = UID.replace('-', "_");
        let own = above.join(format!("kubepods-burstable-pod{uid}.slice"));
        fs::create_dir_all(&own).expect("a cgroup");
        Cgroup(own)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
        let _ = self.0.parent().map(fs::remove_dir);
    }
}

fn programs() {
    if !intercept::ebpf::built() {
        println!("skipped: mode EBPF needs clang at the time of the build");
        assert!(env::var_os("CI").is_none());
        return;
    }
    let (_dir, conf) = folder(&pod(json!({"sidecar.istio.io/interceptionMode": "EBPF"})));
    let namespace = Namespace::new();
    let (path, group_path) = (namespace.path(), Cgroup::new());
    let kept = || {
        let inode = namespace.sh("stat -Lc %i /proc/self/ns/net");
        Path::new("/sys/fs/bpf/outrigger").join(inode.trim())
    };
    let begun = Instant::now();
    let output = plugin("ADD", &path, &conf);
    println!("  ADD took {:?}", begun.elapsed());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(kept().is_dir() && namespace.rules().is_empty());
    // The proxy of the pod, and a call from the pod's cgroup.
    let net = fs::File::open(&path).expect("a namespace");
    thread::spawn(move || {
        nix::sched::setns(net, nix::sched::CloneFlags::CLONE_NEWNET).expect("root may");
        let listener = TcpListener::bind("0.0.0.0:15001").expect("the port is free");
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.write_all(b"outbound");
        }
    });
    let call = || {
        namespace.sh(&format!(
            "ip route replace default via 10.9.0.1 dev eth0; echo $$ >{}/cgroup.procs; \
             timeout 5 bash -c 'exec 3<>/dev/tcp/10.96.7.7/9080 && cat <&3' 2>&1 || true",
            group_path.0.display()
        ))
    };
    let end = Instant::now() + Duration::from_secs(5);
    while call() != "outbound" {
        assert!(Instant::now() < end, "{}", call());
    }
    assert!(plugin("ADD", &path, &conf).status.success());
    let output = plugin("CHECK", &path, &conf);
    assert!(output.status.success(), "{}", result(&output));
    let set = fs::read_dir(kept()).expect("programs").flatten().next();
    fs::remove_file(set.expect("a set").path().join("steer")).expect("it is pinned");
    let error = result(&plugin("CHECK", &path, &conf));
    let message = error["msg"].as_str().unwrap_or_default();
    assert_eq!(error["code"], 102);
    assert!(
        message.contains("the program steer, which leads inbound calls"),
        "{message}"
    );
    assert!(plugin("DEL", &path, &conf).status.success());
    assert!(!kept().exists());
    assert_ne!(call(), "outbound");
    // A namespace that is gone before DEL takes its programs with it.
    assert!(plugin("ADD", &path, &conf).status.success());
    let kept = kept();
    assert!(kept.is_dir());
    drop(group_path);
    let error = result(&plugin("CHECK", &path, &conf));
    let message = error["msg"].as_str().unwrap_or_default();
    assert!(message.contains("there is none for uid"), "{error}");
    assert!(plugin("DEL", "", &conf).status.success());
    assert!(!kept.exists());
}

fn check() {
    let (_dir, conf) = folder(&pod(json!({})));
    let namespace = Namespace::new();
    assert!(plugin("ADD", &namespace.path(), &conf).status.success());
    let output = plugin("CHECK", &namespace.path(), &conf);
    assert!(output.status.success() && output.stdout.is_empty());
    namespace.sh("iptables -t nat -D ISTIO_OUTPUT -j ISTIO_REDIRECT");
    let output = plugin("CHECK", &namespace.path(), &conf);
    let error = result(&output);
    assert_eq!(error["code"], 102);
    let message = error["msg"].as_str().unwrap_or_default();
    assert!(
        message.contains("ISTIO_OUTPUT lacks: -j ISTIO_REDIRECT"),
        "{message}"
    );
    let mut bare = conf.clone();
    bare["prevResult"] = Value::Null;
    assert_eq!(
        result(&plugin("CHECK", &namespace.path(), &bare))["code"],
        7
    );
}

fn others() {
    let mut with_init = pod(json!({}));
    with_init["spec"]["initContainers"] = json!([{"name": "istio-init"}]);
    let namespace = Namespace::new();
    let (_dir, conf) = folder(&with_init);
    let output = plugin("ADD", &namespace.path(), &conf);
    assert_eq!(result(&output), conf["prevResult"]);
    let (_dir, mut conf) = folder(&pod(json!({})));
    conf["exclude_namespaces"] = json!(["shop"]);
    assert!(plugin("ADD", &namespace.path(), &conf).status.success());
    assert!(plugin("DEL", "/nowhere", &conf).status.success());
    assert_eq!(namespace.rules(), "");
}

/// An API server of the test's own, with a certificate of its own.
fn kubernetes() {
    let key = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(
            vec![key.cert.der().clone()],
            rustls_pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()).into(),
        )
        .expect("the certificate fits");
    let listener = TcpListener::bind("127.0.0.1:0").expect("an address");
    let at = listener.local_addr().expect("it is bound");
    let body = pod(json!({"traffic.sidecar.istio.io/includeInboundPorts": "9080"})).to_string();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        let connection = rustls::ServerConnection::new(Arc::new(tls)).expect("a connection");
        let mut stream = rustls::StreamOwned::new(connection, stream);
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).expect("a request");
            request.push(byte[0]);
        }
        write!(
            stream,
            "HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n{body}"
        )
        .expect("it listens");
        stream.conn.send_close_notify();
        stream.flush().expect("it listens");
        String::from_utf8(request).expect("text")
    });
    let (dir, mut conf) = folder(&json!({}));
    let path = dir.path().join("kubeconfig");
    let ca = dir.path().join("ca.pem");
    fs::write(&ca, key.cert.pem()).expect("it is writable");
    fs::write(
        &path,
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             contexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {{server: 'https://{at}', certificate-authority: {}}}}}]\n\
             users: [{{name: u, user: {{token: abc.def}}}}]\n",
            ca.display()
        ),
    )
    .expect("it is writable");
    conf.as_object_mut()
        .expect("an object")
        .remove("outrigger_pods");
    conf["kubernetes"] = json!({"kubeconfig": path});
    let namespace = Namespace::new();
    let output = plugin("ADD", &namespace.path(), &conf);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        namespace
            .rules()
            .contains("--dport 9080 -j ISTIO_IN_REDIRECT")
    );
    let request = server.join().expect("the server ends well");
    assert!(
        request.starts_with("GET /api/v1/namespaces/shop/pods/web-1 HTTP/1.0\r\n"),
        "{request}"
    );
    assert!(
        request.contains("authorization: Bearer abc.def\r\n"),
        "{request}"
    );
}

fn mistakes() {
    let (_dir, conf) = folder(&pod(json!({"sidecar.istio.io/interceptionMode": "NONE"})));
    let error = result(&plugin("ADD", "/nowhere", &conf));
    assert_eq!(
        (&error["code"], &error["cniVersion"]),
        (&json!(100), &json!("1.0.0"))
    );
    let (_dir, conf) = folder(&pod(json!({})));
    let error = result(&plugin("ADD", "/nowhere", &conf));
    assert_eq!(error["code"], 5);
    assert!(
        error["msg"]
            .as_str()
            .unwrap_or_default()
            .contains("/nowhere")
    );
    assert_eq!(result(&plugin("ADD", "", &conf))["code"], 4);
    assert_eq!(result(&plugin("JUMP", "", &conf))["code"], 4);
    let mut odd = conf.clone();
    odd["colour"] = json!("red");
    let error = result(&plugin("ADD", "/nowhere", &odd));
    assert_eq!(error["code"], 2);
    let output = plugin("ADD", "/nowhere", &json!("text"));
    assert_eq!(
        (result(&output)["code"].clone(), output.status.success()),
        (json!(6), false)
    );
}
