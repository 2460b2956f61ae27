//! The agent's name server between clients and resolvers of the test's own.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use outrigger_agent::dns::{Dns, Options, table::Place};
use proto::istio::networking::nds::v1::{NameTable, name_table::NameInfo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// How long a resolver may take.
const TIMEOUT: Duration = Duration::from_secs(5);

fn start(servers: Vec<SocketAddr>, parallel: bool) -> Arc<Dns> {
    let dns = Dns::start(Options {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        servers,
        place: Place {
            namespace: "shop".into(),
            search: vec!["shop.svc.cluster.local".into()],
        },
        timeout: TIMEOUT,
        parallel,
    })
    .unwrap();
    dns.update(&NameTable {
        table: [(
            "reviews.shop.svc.cluster.local".to_owned(),
            NameInfo {
                ips: vec!["10.96.0.7".into()],
                registry: "Kubernetes".into(),
                shortname: "reviews".into(),
                namespace: "shop".into(),
                alt_hosts: Vec::new(),
            },
        )]
        .into(),
        name_info: None,
    });
    dns
}

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut query = Message::new(id, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    query.to_vec().unwrap()
}

/// An answer with as many addresses as asked for.
fn answer(query: &[u8], addresses: u8) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let mut out = Message::response(query.metadata.id, OpCode::Query);
    let name = query.queries[0].name().clone();
    out.add_queries(query.queries);
    for n in 0..addresses {
        let data = RData::A(rdata::A::new(192, 0, 2, n));
        out.add_answer(Record::from_rdata(name.clone(), 60, data));
    }
    out.to_vec().unwrap()
}

/// A resolver: what it makes of each query, and when.
fn resolver(
    reply: impl Fn(&[u8]) -> Option<(Duration, Vec<u8>)> + Send + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBuf, &(4 << 20)).unwrap();
    let (at, count) = (socket.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counted = count.clone();
    let (later, due) = std::sync::mpsc::channel::<(Instant, Vec<u8>, SocketAddr)>();
    let out = socket.try_clone().unwrap();
    thread::spawn(move || {
        for (when, packet, client) in due {
            thread::sleep(when.saturating_duration_since(Instant::now()));
            let _ = out.send_to(&packet, client);
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            counted.fetch_add(1, Ordering::SeqCst);
            if let Some((delay, packet)) = reply(&buffer[..length]) {
                let _ = later.send((Instant::now() + delay, packet, client));
            }
        }
    });
    (at, count)
}

fn ask(dns: &Dns, packet: &[u8]) -> Message {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    client.send_to(packet, dns.addresses[0]).unwrap();
    let mut buffer = [0; 4096];
    let length = client.recv(&mut buffer).unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

#[test]
fn names_of_the_mesh_stay_here_and_others_go_on() {
    let (server, count) = resolver(|q| Some((Duration::ZERO, answer(q, 1))));
    let dns = start(vec![server], false);
    let local = ask(&dns, &query(7, "reviews.shop."));
    assert_eq!(local.metadata.id, 7);
    assert!(local.answers[0].to_string().contains("A 10.96.0.7"));
    assert_eq!(count.load(Ordering::SeqCst), 0);
    let other = ask(&dns, &query(8, "example.org."));
    assert_eq!(other.metadata.id, 8);
    assert!(other.answers[0].to_string().contains("60 IN A 192.0.2.0"));
    let text = dns.figures.text();
    assert!(
        text.contains("istio_agent_dns_requests_total 2\n"),
        "{text}"
    );
    assert!(
        text.contains("istio_agent_dns_upstream_requests_total 1\n"),
        "{text}"
    );
}

#[test]
fn a_silent_or_failing_resolver_is_passed_over() {
    let (silent, _) = resolver(|_| None);
    let (failing, _) = resolver(|q| {
        let mut out = answer(q, 0);
        out[3] |= 2;
        Some((Duration::ZERO, out))
    });
    let (good, _) = resolver(|q| Some((Duration::ZERO, answer(q, 1))));
    for first in [silent, failing] {
        let dns = start(vec![first, good], false);
        let reply = ask(&dns, &query(1, "example.org."));
        assert_eq!(reply.answers.len(), 1);
    }
    let dns = start(vec![silent, good], true);
    let begun = Instant::now();
    assert_eq!(ask(&dns, &query(1, "example.org.")).answers.len(), 1);
    assert!(begun.elapsed() < TIMEOUT, "the silent one was waited for");
    // What all of them say stands: a refusal is passed on, silence becomes SERVFAIL.
    let dns = start(vec![failing], false);
    let reply = ask(&dns, &query(1, "example.org."));
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    let dns = start(Vec::new(), false);
    let reply = ask(&dns, &query(1, "example.org."));
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn a_forged_answer_is_not_taken() {
    let forged = |q: &[u8]| {
        let mut other = answer(&query(0, "evil.org."), 1);
        other[..2].copy_from_slice(&q[..2]);
        other
    };
    let (server, _) = resolver(move |q| Some((Duration::ZERO, forged(q))));
    let (good, _) = resolver(|q| Some((Duration::ZERO, answer(q, 2))));
    let dns = start(vec![server, good], false);
    assert_eq!(ask(&dns, &query(1, "example.org.")).answers.len(), 2);
}

#[tokio::test]
async fn what_does_not_fit_comes_over_tcp() {
    // Over UDP the resolver's long answer is cut; over TCP it passes whole.
    let (udp, _) = resolver(|q| Some((Duration::ZERO, answer(q, 200))));
    let listener = TcpListener::bind(udp).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let length = stream.read_u16().await.unwrap();
            let mut query = vec![0; length.into()];
            stream.read_exact(&mut query).await.unwrap();
            let reply = answer(&query, 200);
            stream.write_u16(reply.len() as u16).await.unwrap();
            stream.write_all(&reply).await.unwrap();
        }
    });
    let dns = start(vec![udp], false);
    let packet = query(3, "example.org.");
    let cut = {
        let (dns, packet) = (dns.clone(), packet.clone());
        tokio::task::spawn_blocking(move || ask(&dns, &packet))
            .await
            .unwrap()
    };
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let mut stream = TcpStream::connect(dns.addresses[0]).await.unwrap();
    // Two queries on one connection, the first in pieces.
    for piece in [&[0][..], &[packet.len() as u8], &packet[..5], &packet[5..]] {
        stream.write_all(piece).await.unwrap();
        stream.flush().await.unwrap();
    }
    for _ in 0..2 {
        let length = stream.read_u16().await.unwrap();
        let mut reply = vec![0; length.into()];
        stream.read_exact(&mut reply).await.unwrap();
        let reply = Message::from_vec(&reply).unwrap();
        assert_eq!((reply.metadata.id, reply.answers.len()), (3, 200));
        stream.write_u16(packet.len() as u16).await.unwrap();
        stream.write_all(&packet).await.unwrap();
    }
}

/// Ten thousand queries wait at once while the resolver takes two seconds for each: none is lost, and names of the
/// mesh are answered at once meanwhile.
#[test]
fn ten_thousand_queries_outlast_a_slow_resolver() {
    const MANY: usize = 10_000;
    const CLIENTS: usize = 20;
    const SLOW: Duration = Duration::from_secs(2);
    let (server, _) = resolver(|q| Some((SLOW, answer(q, 1))));
    let dns = start(vec![server], false);
    let at = dns.addresses[0];
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            thread::spawn(move || {
                let client = UdpSocket::bind("127.0.0.1:0").unwrap();
                client.connect(at).unwrap();
                let room = nix::sys::socket::sockopt::RcvBuf;
                nix::sys::socket::setsockopt(&client, room, &(4 << 20)).unwrap();
                client
                    .set_read_timeout(Some(Duration::from_secs(10)))
                    .unwrap();
                let sender = client.try_clone().unwrap();
                let sending = thread::spawn(move || {
                    for i in 0..MANY / CLIENTS {
                        let name = format!("h{n}-{i}.example.org.");
                        sender.send(&query(i as u16, &name)).unwrap();
                        // 10,000 a second in all: no faster than any socket's buffer takes.
                        thread::sleep(Duration::from_millis(2));
                    }
                });
                let mut seen = vec![false; MANY / CLIENTS];
                let mut buffer = [0; 1024];
                while seen.iter().any(|s| !s) {
                    let Ok(length) = client.recv(&mut buffer) else {
                        break;
                    };
                    let reply = Message::from_vec(&buffer[..length]).unwrap();
                    if reply.answers.len() == 1 {
                        seen[usize::from(reply.metadata.id)] = true;
                    }
                }
                sending.join().unwrap();
                seen.iter().filter(|s| !**s).count()
            })
        })
        .collect();
    let begun = Instant::now();
    let local = ask(&dns, &query(7, "reviews.shop."));
    assert_eq!(local.answers.len(), 1);
    assert!(
        begun.elapsed() < SLOW,
        "it waited behind names that are not of the mesh"
    );
    let lost: usize = clients.into_iter().map(|c| c.join().unwrap()).sum();
    assert_eq!(lost, 0);
}
