//! A warm proxy allocates nothing for a request of HTTP/1 with the default filters: the promise that the hot path is
//! built on.
//!
//! `unsafe` because a global allocator is; it hands everything to the system's.
#![allow(unsafe_code)]

#[allow(dead_code)]
#[path = "http/support.rs"]
mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use outrigger_proxy as proxy;
use proto::envoy::config;
use proxy::{plan::Listener, server::Change};
use support::{Mesh, TO_A, run};
use testkit::envoy::message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The thread of client and origin does not count.
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if !IS_OURS.try_with(Cell::get).unwrap_or(true) {
        COUNT.fetch_add(1, Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LISTENER: &str = "name: m
address: {socket_address: {address: 127.0.0.1, port_value: 0}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: quiet
      route_config: {name: r, virtual_hosts: [{name: v, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: a}}]}]}
      http_filters:
      - name: router
        typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
";

/// An origin that answers every head that it reads, without an allocation of note.
async fn origin() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut bytes = [0; 4096];
                while matches!(stream.read(&mut bytes).await, Ok(count) if count > 0) {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

#[test]
fn a_warm_proxy_serves_requests_without_allocating() {
    const REQUESTS: u64 = 1000;
    IS_OURS.set(true);
    run(async {
        let port = origin().await;
        let mesh = Mesh::new(TO_A, "", "", &[("a", port)]).await;
        let plan = Listener::try_from(&message::<config::listener::v3::Listener>(LISTENER));
        for result in mesh
            .server
            .apply(vec![Change::UpsertListener(Arc::new(plan.unwrap()))])
        {
            result.unwrap();
        }
        mesh.server.settled().await;
        let address = mesh.server.listener_address("m").unwrap();
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut bytes = [0; 4096];
        let mut before = 0;
        for turn in 0..2 * REQUESTS {
            if turn == REQUESTS {
                before = COUNT.load(Relaxed);
            }
            let request =
                b"GET /some/path HTTP/1.1\r\nHost: h\r\nUser-Agent: u\r\nAccept: */*\r\n\r\n";
            stream.write_all(request).await.unwrap();
            let mut read = 0;
            while !bytes[..read].ends_with(b"\r\n\r\nok") {
                let count = stream.read(&mut bytes[read..]).await.unwrap();
                assert!(count > 0);
                read += count;
            }
        }
        let made = COUNT.load(Relaxed) - before;
        assert!(before > 0, "it counts");
        // What runs beside requests (timers of the process, statistics) allocates now and then.
        println!("{made} allocations for {REQUESTS} requests");
        assert!(
            made < REQUESTS / 10,
            "{made} allocations for {REQUESTS} requests"
        );
    });
}
