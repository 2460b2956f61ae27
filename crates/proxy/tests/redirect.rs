//! Redirected connections, in a network namespace of their own: hand-off to the listener of the original destination,
//! ORIGINAL_DST clusters, and the source address 127.0.0.6.

use std::{process::Command, rc::Rc, sync::Arc, time::Duration};

use nix::sched::{CloneFlags, unshare};
use outrigger_proxy::{
    plan::{Bootstrap, Cluster, Listener},
    server::{Change, Server},
    worker::Options,
};
use proto::envoy::config;
use testkit::envoy::message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket},
    task::LocalSet,
};

fn cluster(yaml: &str) -> Change {
    let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(yaml));
    Change::UpsertCluster(Arc::new(plan.expect("the test's cluster is good").into()))
}

fn listener(head: &str, filters: &str) -> Change {
    let yaml = format!("{head}\nfilter_chains:\n{filters}");
    let plan = Listener::try_from(&message::<config::listener::v3::Listener>(&yaml));
    Change::UpsertListener(Arc::new(plan.expect("the test's listener is good")))
}

fn tcp_to(cluster: &str) -> String {
    format!(
        "filters: [{{name: tcp, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, \
         stat_prefix: {cluster}, cluster: {cluster}}}}}]"
    )
}

fn run(line: &str) -> bool {
    let mut words = line.split(' ');
    Command::new(words.next().expect("a program"))
        .args(words)
        .status()
        .is_ok_and(|status| status.success())
}

/// Says its name and who its peer is.
async fn named(address: &str, name: &'static str) {
    let listener = TcpListener::bind(address)
        .await
        .expect("the namespace is empty");
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, peer)) = listener.accept().await {
            let _ = stream
                .write_all(format!("{name} {}", peer.ip()).as_bytes())
                .await;
        }
    });
}

/// What a client whose connections are redirected reads.
async fn ask(address: &str) -> String {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .bind("10.9.9.8:0".parse().expect("an address"))
        .expect("it is ours");
    let connect = socket.connect(address.parse().expect("an address"));
    let mut text = String::new();
    let read = async { connect.await?.read_to_string(&mut text).await };
    match tokio::time::timeout(Duration::from_secs(10), read).await {
        Ok(_) => text,
        Err(_) => panic!("{address} does not answer"),
    }
}

async fn scenario() {
    named("127.0.0.1:7001", "handed-over").await;
    named("10.9.9.9:8888", "passed-through").await;
    named("10.9.9.9:8889", "inbound").await;
    let bootstrap = Bootstrap::try_from(&config::bootstrap::v3::Bootstrap::default());
    let bootstrap = Arc::new(bootstrap.expect("an empty bootstrap is good"));
    let options = Options {
        concurrency: 2,
        ..Options::default()
    };
    let server: Rc<Server> =
        Server::start(bootstrap, options, stats::Store::default()).expect("threads can be started");
    let original = "type: ORIGINAL_DST\nlb_policy: CLUSTER_PROVIDED";
    let address =
        |port| format!("address: {{socket_address: {{address: 0.0.0.0, port_value: {port}}}}}");
    for result in server.apply(vec![
        cluster(&format!("name: PassthroughCluster\n{original}")),
        cluster(&format!(
            "name: InboundPassthroughCluster\n{original}\nupstream_bind_config: {{source_address: {{address: 127.0.0.6, port_value: 0}}}}"
        )),
        cluster("name: BlackHoleCluster\ntype: STATIC"),
        cluster(
            "name: o\ntype: STATIC\nload_assignment: {cluster_name: o, endpoints: [{lb_endpoints: [{endpoint: {address: \
             {socket_address: {address: 127.0.0.1, port_value: 7001}}}}]}]}",
        ),
        listener(
            &format!("name: virtualOutbound\nuse_original_dst: true\n{}", address(15001)),
            &format!(
                "- filter_chain_match: {{destination_port: 15001}}\n  {}\n- {}",
                tcp_to("BlackHoleCluster"),
                tcp_to("PassthroughCluster")
            ),
        ),
        listener(
            &format!("name: shared\nbind_to_port: false\n{}", address(9999)),
            &format!("- {}", tcp_to("o")),
        ),
        listener(
            &format!(
                "name: virtualInbound\n{}\nlistener_filters: [{{name: original_dst, typed_config: {{\"@type\": \
                 type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}}}]",
                address(15006)
            ),
            &format!("- {}", tcp_to("InboundPassthroughCluster")),
        ),
    ]) {
        result.expect("the change is good");
    }
    server.settled().await;
    assert_eq!(ask("10.9.9.9:9999").await, "handed-over 127.0.0.1");
    assert_eq!(ask("10.9.9.9:8888").await, "passed-through 10.9.9.9");
    assert_eq!(ask("10.9.9.9:8889").await, "inbound 127.0.0.6");
    assert_eq!(
        ask("10.9.9.9:15001").await,
        "",
        "a connection to the proxy itself ends"
    );
    assert_eq!(
        server
            .store
            .number("listener.0.0.0.0_15001.downstream_cx_total"),
        3
    );
    assert_eq!(
        server
            .store
            .number("listener.0.0.0.0_9999.downstream_cx_total"),
        1
    );
    assert_eq!(
        server
            .store
            .number("cluster.BlackHoleCluster.upstream_cx_none_healthy"),
        1
    );
}

#[test]
fn redirected_connections_find_their_listener_and_their_destination() {
    // The namespace belongs to this thread and to those that it starts.
    let test = || {
        let rules = [
            "ip link set lo up",
            "ip addr add 10.9.9.8/32 dev lo",
            "ip addr add 10.9.9.9/32 dev lo",
            "iptables -t nat -A OUTPUT -p tcp -s 10.9.9.8 --dport 9999 -j REDIRECT --to-ports 15001",
            "iptables -t nat -A OUTPUT -p tcp -s 10.9.9.8 --dport 8888 -j REDIRECT --to-ports 15001",
            "iptables -t nat -A OUTPUT -p tcp -s 10.9.9.8 --dport 8889 -j REDIRECT --to-ports 15006",
        ];
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !rules.iter().all(|rule| run(rule)) {
            assert!(
                std::env::var_os("CI").is_none(),
                "root, ip and iptables are needed"
            );
            println!("skipped: root, ip and iptables are needed");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("it builds");
        LocalSet::new().block_on(&runtime, scenario());
    };
    std::thread::spawn(test).join().expect("the test passes");
}
