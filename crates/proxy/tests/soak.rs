//! Requests that meet connections which their origin is just closing: idle timeout 20 ms, gaps of 19 to 21 ms, 50
//! connections. No GET fails, and no POST arrives twice. `./x test soak` runs the long form.

#[allow(dead_code)]
#[path = "http/support.rs"]
mod support;

use std::{
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use support::{Mesh, TO_A, run};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{JoinSet, spawn_local},
    time::timeout,
};

const CONNECTIONS: usize = 50;
const IDLE: Duration = Duration::from_millis(20);

/// How often each request has arrived.
type Arrivals = Arc<Mutex<HashMap<String, u32>>>;

/// An origin on a thread of its own, so that its timer is on time.
fn origin(arrivals: Arrivals) -> u16 {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        run(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap().port()).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                spawn_local(serve(stream, arrivals.clone()));
            }
        });
    });
    receiver.recv().unwrap()
}

async fn serve(mut stream: TcpStream, arrivals: Arrivals) {
    let mut bytes = Vec::new();
    // As servers do it: the idle timeout is for what comes between requests.
    let mut limit = Duration::from_secs(20);
    while let Ok(Some(head)) = timeout(limit, head(&mut stream, &mut bytes)).await {
        limit = IDLE;
        let name = head.lines().next().unwrap_or_default().to_owned();
        *arrivals.lock().unwrap().entry(name).or_default() += 1;
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        if stream.write_all(answer).await.is_err() {
            return;
        }
    }
}

/// One head, and a body of as many bytes as it declares.
async fn head(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let length = head
                .lines()
                .find_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    let is = name.eq_ignore_ascii_case("content-length");
                    is.then(|| value.trim().parse::<usize>().ok())?
                })
                .unwrap_or(0);
            if bytes.len() >= end + 4 + length {
                bytes.drain(..end + 4 + length);
                return Some(head);
            }
        }
        if stream.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// What the clients got.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    gets: u32,
    failed_gets: u32,
    posts: u32,
    failed_posts: u32,
}

async fn client(address: SocketAddr, number: usize, gets: u32, posts: u32) -> Counts {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut counts, mut bytes) = (Counts::default(), Vec::new());
    // A fixed sequence for each client (splitmix64).
    let mut state = number as u64;
    for turn in 0..gets + posts {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        tokio::time::sleep(IDLE - Duration::from_millis(1) + Duration::from_micros(mixed % 2000))
            .await;
        // POSTs are spread among the GETs.
        let post = u64::from(turn + 1) * u64::from(posts) / u64::from(gets + posts)
            > u64::from(turn) * u64::from(posts) / u64::from(gets + posts);
        let (method, body) = if post {
            ("POST", "Content-Length: 1\r\n\r\nx")
        } else {
            ("GET", "\r\n")
        };
        let request = format!("{method} /{number}/{turn} HTTP/1.1\r\nHost: h\r\n{body}");
        let answered = match stream.write_all(request.as_bytes()).await {
            Ok(()) => timeout(Duration::from_secs(20), head(&mut stream, &mut bytes)).await,
            Err(_) => Ok(None),
        };
        let good = matches!(&answered, Ok(Some(head)) if head.starts_with("HTTP/1.1 200 "));
        if post {
            counts.posts += 1;
            counts.failed_posts += u32::from(!good);
        } else {
            counts.gets += 1;
            counts.failed_gets += u32::from(!good);
        }
        if !matches!(answered, Ok(Some(_))) {
            stream = TcpStream::connect(address).await.unwrap();
            bytes.clear();
        }
    }
    counts
}

fn soak(gets: u32, posts: u32, cluster: &'static str) {
    run(async move {
        let arrivals = Arrivals::default();
        let port = origin(arrivals.clone());
        let mesh = Rc::new(Mesh::with(TO_A, "", "", &[("a", port)], cluster).await);
        let address = mesh.server.listener_address("l").unwrap();
        let mut clients = JoinSet::new();
        for number in 0..CONNECTIONS {
            let share = |all: u32| all / CONNECTIONS as u32;
            clients.spawn_local(client(address, number, share(gets), share(posts)));
        }
        let mut sum = Counts::default();
        while let Some(counts) = clients.join_next().await {
            let counts = counts.unwrap();
            sum.gets += counts.gets;
            sum.failed_gets += counts.failed_gets;
            sum.posts += counts.posts;
            sum.failed_posts += counts.failed_posts;
        }
        let number = |name: &str| mesh.server.store.number(&format!("cluster.a.{name}"));
        println!(
            "{cluster:?}: {sum:?}; connections: {}, closed by the origin: {}, left to age: {}",
            number("upstream_cx_total"),
            number("upstream_cx_destroy_remote"),
            number("upstream_cx_idle_timeout"),
        );
        assert_eq!((sum.gets, sum.posts), (gets, posts));
        assert_eq!(sum.failed_gets, 0, "no GET may fail");
        let arrivals = arrivals.lock().unwrap();
        let twice: Vec<_> = arrivals
            .iter()
            .filter(|(name, count)| name.starts_with("POST") && **count > 1)
            .collect();
        assert!(twice.is_empty(), "sent twice: {twice:?}");
    });
}

/// Each client's requests come to one pool, whose connections rest as long as the client does.
const OWN_POOLS: &str = "connection_pool_per_downstream_connection: true";

#[test]
fn a_short_soak() {
    soak(1000, 100, OWN_POOLS);
    soak(500, 50, "");
}

#[test]
#[ignore = "takes minutes: ./x test soak"]
fn a_long_soak() {
    soak(100_000, 10_000, OWN_POOLS);
    soak(100_000, 10_000, "");
}
