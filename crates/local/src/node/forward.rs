//! Ports of this machine that lead into pods.
//!
//! Listening sockets belong to the machine's namespace, connections onwards to the node's. A socket stays in the
//! namespace in which it was made, so one thread that never left the machine's makes the listeners for the others.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener as StdListener},
    rc::Rc,
    sync::mpsc,
    thread,
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

/// Makes listening sockets in the namespace of the thread that called [`HostSockets::start`].
#[derive(Clone, Debug)]
pub(crate) struct HostSockets {
    requests: mpsc::Sender<(SocketAddr, oneshot::Sender<io::Result<StdListener>>)>,
}

impl HostSockets {
    /// Starts the thread; call this before entering another namespace.
    pub(crate) fn start() -> Self {
        let (requests, incoming) = mpsc::channel::<(SocketAddr, oneshot::Sender<_>)>();
        thread::spawn(move || {
            for (address, answer) in incoming {
                // Whoever asked may have gone.
                let _ = answer.send(StdListener::bind(address));
            }
        });
        Self { requests }
    }

    async fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let (answer, listener) = oneshot::channel();
        let gone = || io::Error::other("the thread that makes sockets has ended");
        self.requests.send((address, answer)).map_err(|_| gone())?;
        let listener = listener.await.map_err(|_| gone())??;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    }
}

/// Where connections of a forwarded port go now; empty while no pod is ready.
pub(crate) type Targets = Rc<RefCell<Vec<(Ipv4Addr, u16)>>>;

/// A forwarded port, closed when dropped.
#[derive(Debug)]
pub(crate) struct Forwarder {
    pub(crate) local: SocketAddr,
    pub(crate) targets: Targets,
    task: JoinHandle<()>,
}

impl Forwarder {
    /// Opens the wanted port of 127.0.0.1, or any free one where it is taken.
    pub(crate) async fn open(host: &HostSockets, wanted: u16) -> io::Result<Self> {
        let address = |port| SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        let listener = match host.listen(address(wanted)).await {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && wanted != 0 => {
                host.listen(address(0)).await?
            }
            other => other?,
        };
        let local = listener.local_addr()?;
        let targets = Targets::default();
        let task = tokio::task::spawn_local(accept(listener, targets.clone()));
        Ok(Self {
            local,
            targets,
            task,
        })
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, targets: Targets) {
    let mut turn = 0usize;
    loop {
        let Ok((mut client, _)) = listener.accept().await else {
            // Out of descriptors, most likely: let others finish first.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let target = {
            let list = targets.borrow();
            if list.is_empty() {
                None
            } else {
                Some(list[turn % list.len()])
            }
        };
        turn = turn.wrapping_add(1);
        // Without a target the connection is closed at once, as a refused one would be.
        let Some(target) = target else { continue };
        tokio::task::spawn_local(async move {
            if let Ok(mut pod) = TcpStream::connect(target).await {
                let _ = client.set_nodelay(true);
                let _ = pod.set_nodelay(true);
                // Either side may break off; both are closed then.
                let _ = copy_bidirectional(&mut client, &mut pod).await;
            }
        });
    }
}

/// The ports that are open now, by service and port.
pub(crate) type Forwarders = HashMap<(String, String, u16), Forwarder>;
