//! Connections that TPROXY steers to the proxy, in network namespaces of their own: the proxy accepts them without address
//! translation, and the app sees the client's address.

use std::{
    io::{Read, Write},
    net::TcpListener,
    process::Command,
    sync::Arc,
};

use nix::sched::{CloneFlags, unshare};
use outrigger_proxy::{
    plan::{Bootstrap, Cluster, Listener},
    server::{Change, Server},
    worker::Options,
};
use proto::envoy::config;
use testkit::envoy::message;
use tokio::task::LocalSet;

fn run(line: &str) -> bool {
    let mut words = line.split(' ');
    Command::new(words.next().expect("a program"))
        .args(words)
        .status()
        .is_ok_and(|status| status.success())
}

/// An app that says who its peer is and whom the peer meant.
fn app(address: &str) {
    let listener = TcpListener::bind(address).expect("the namespace is empty");
    // The thread ends with the process; its socket belongs to the namespace it was made in.
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            let local = stream.local_addr().expect("it is connected");
            let _ = stream.write_all(format!("{} at {local}", peer.ip()).as_bytes());
        }
    });
}

/// As istiod makes it for `INTERCEPTION_MODE: TPROXY`: the cluster's own source must give way to the client's address.
async fn proxy() -> std::rc::Rc<Server> {
    let bootstrap = Bootstrap::try_from(&config::bootstrap::v3::Bootstrap::default());
    let bootstrap = Arc::new(bootstrap.expect("an empty bootstrap is good"));
    let server = Server::start(bootstrap, Options::default(), stats::Store::default())
        .expect("threads can be started");
    let cluster = message::<config::cluster::v3::Cluster>(
        "name: InboundPassthroughCluster\ntype: ORIGINAL_DST\nlb_policy: CLUSTER_PROVIDED\n\
         upstream_bind_config: {source_address: {address: 127.0.0.6, port_value: 0}, \
         additional_source_addresses: [{address: '::6', port_value: 0}]}",
    );
    let cluster = Cluster::try_from(&cluster).expect("the test's cluster is good");
    let mut changes = vec![Change::UpsertCluster(Arc::new(cluster.into()))];
    for (name, address) in [("v4", "0.0.0.0"), ("v6", "'::'")] {
        let listener = message::<config::listener::v3::Listener>(&format!(
            "name: {name}\naddress: {{socket_address: {{address: {address}, port_value: 15006}}}}\ntransparent: true\n\
             listener_filters:\n\
             - {{name: original_dst, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}}}\n\
             - {{name: original_src, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc, mark: 1337}}}}\n\
             filter_chains: [{{filters: [{{name: tcp, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, \
             stat_prefix: inbound, cluster: InboundPassthroughCluster}}}}]}}]"
        ));
        let listener = Listener::try_from(&listener).expect("the test's listener is good");
        changes.push(Change::UpsertListener(Arc::new(listener)));
    }
    for result in server.apply(changes) {
        result.expect("the change is good");
    }
    server.settled().await;
    server
}

/// What a client in the other namespace reads.
fn ask(client: u32, address: &str) -> String {
    let (host, port) = address.rsplit_once(':').expect("an address");
    let host = host.trim_matches(['[', ']']);
    let script = format!("exec 3<>/dev/tcp/{host}/{port}; cat <&3");
    let output = Command::new("nsenter")
        .args([
            "-n",
            "--target",
            &client.to_string(),
            "timeout",
            "10",
            "bash",
            "-c",
            &script,
        ])
        .output()
        .expect("nsenter starts");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn scenario(client: u32) {
    app("10.9.8.1:8080");
    app("[fd09::1]:8080");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("it builds");
    LocalSet::new().block_on(&runtime, async {
        let server = proxy().await;
        assert_eq!(ask(client, "10.9.8.1:8080"), "10.9.8.2 at 10.9.8.1:8080");
        assert_eq!(ask(client, "[fd09::1]:8080"), "fd09::2 at [fd09::1]:8080");
        for listener in ["0.0.0.0_15006", "[__]_15006"] {
            let name = format!("listener.{listener}.downstream_cx_total");
            assert_eq!(server.store.number(&name), 1, "{name}");
        }
    });
}

#[test]
fn the_app_sees_the_client() {
    // The namespace belongs to this thread and to those that it starts.
    let test = || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            return skip();
        }
        // A process of its own holds the client's namespace until its input ends.
        let mut holder = Command::new("unshare")
            .args(["-n", "sh", "-c", "echo ready; cat"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut ready = [0; 6];
        let _ = holder
            .stdout
            .as_mut()
            .expect("it is piped")
            .read_exact(&mut ready);
        let client = holder.id();
        let mut lines = vec![
            "ip link set lo up".to_owned(),
            "ip link add here type veth peer name there".to_owned(),
            format!("ip link set there netns {client}"),
            "ip addr add 10.9.8.1/24 dev here".to_owned(),
            "ip -6 addr add fd09::1/64 dev here nodad".to_owned(),
            "ip link set here up".to_owned(),
        ];
        for line in [
            "ip addr add 10.9.8.2/24 dev there",
            "ip -6 addr add fd09::2/64 dev there nodad",
            "ip link set there up",
        ] {
            lines.push(format!("nsenter -n --target {client} {line}"));
        }
        // The rules of istio-iptables in this mode, as far as one inbound port goes.
        for (ip, tables) in [("ip", "iptables"), ("ip -6", "ip6tables")] {
            lines.push(format!("{ip} rule add fwmark 1337 lookup 133"));
            lines.push(format!("{ip} route add local default dev lo table 133"));
            for rule in [
                "PREROUTING -p tcp -m mark --mark 1337 -j CONNMARK --save-mark",
                "OUTPUT -o lo -p tcp -m mark --mark 1337 -j RETURN",
                "OUTPUT -p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark",
                "PREROUTING -i here -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j MARK --set-mark 1337",
                "PREROUTING -i here -p tcp --dport 8080 -m conntrack --ctstate NEW -j TPROXY --on-port 15006 --tproxy-mark 1337",
            ] {
                lines.push(format!("{tables} -t mangle -A {rule}"));
            }
        }
        let prepared = lines.iter().all(|line| run(line));
        let result = std::panic::catch_unwind(|| match prepared {
            true => scenario(client),
            false => skip(),
        });
        let _ = holder.kill();
        let _ = holder.wait();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    };
    std::thread::spawn(test).join().expect("the test passes");
}

fn skip() {
    assert!(
        std::env::var_os("CI").is_none(),
        "root, ip, iptables and TPROXY are needed"
    );
    println!("skipped: root, ip, iptables and TPROXY are needed");
}
