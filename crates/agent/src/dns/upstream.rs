//! Queries to the pod's own resolvers.
//!
//! A few sockets serve all queries over UDP: what tells answers apart is the socket's port and the query's id, both
//! random, and the sender's address. Sockets are replaced after a number of queries. A resolver that is silent is not
//! given up: the next one is asked as well, and the first good answer counts, up to the time limit.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher, RandomState},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    sync::mpsc,
    time::timeout,
};

use super::{Dns, Options, wire};

/// The resolvers, and the sockets towards them.
pub(super) struct Upstream {
    servers: Vec<SocketAddr>,
    patience: Duration,
    parallel: bool,
    dns: Arc<Dns>,
    sockets: RefCell<Vec<Rc<Line>>>,
    seed: RandomState,
    count: Cell<u64>,
}

/// One socket and who waits at it.
struct Line {
    socket: UdpSocket,
    v6: bool,
    used: Cell<u32>,
    waiting: RefCell<HashMap<u16, Waiting>>,
}

struct Waiting {
    server: SocketAddr,
    query: Rc<[u8]>,
    answer: mpsc::UnboundedSender<Vec<u8>>,
}

impl Upstream {
    pub(super) fn new(options: &Options, dns: Arc<Dns>) -> Upstream {
        Upstream {
            servers: options.servers.clone(),
            patience: options.timeout,
            parallel: options.parallel,
            dns,
            sockets: RefCell::default(),
            seed: RandomState::new(),
            count: Cell::new(0),
        }
    }

    /// Asks the resolvers; none if none answers in time.
    pub(super) async fn ask(&self, query: Rc<[u8]>, over_tcp: bool) -> Option<Vec<u8>> {
        let figures = &self.dns.figures;
        figures.upstream_requests.fetch_add(1, Ordering::Relaxed);
        let begun = Instant::now();
        let answer = match over_tcp {
            true => timeout(self.patience, self.over_tcp(&query)).await,
            false => timeout(self.patience, self.over_udp(query)).await,
        };
        match answer {
            Ok(Some(answer)) => {
                figures.took(begun.elapsed());
                Some(answer)
            }
            _ => {
                figures.upstream_failures.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    async fn over_udp(&self, query: Rc<[u8]>) -> Option<Vec<u8>> {
        let (send, mut answers) = mpsc::unbounded_channel();
        let mut asked = Vec::new();
        let mut refused = None;
        let mut refusals = 0;
        // Twice around: a query or its answer may be lost.
        let tries = self.servers.iter().chain(&self.servers);
        let last = self.servers.len() * 2;
        for (i, server) in tries.enumerate() {
            // A failure to send is a server that does not answer.
            if let Ok(ticket) = self.send(*server, &query, &send).await {
                asked.push(ticket);
            }
            if self.parallel && i + 1 < self.servers.len() {
                continue;
            }
            let wait = match i + 1 == last {
                true => self.patience,
                false => (self.patience / 4).min(RETRY),
            };
            let next = async {
                while let Some(answer) = answers.recv().await {
                    if !wire::failed(&answer) {
                        return Some(answer);
                    }
                    refused = Some(answer);
                    refusals += 1;
                    // Somebody else may still answer better.
                    if refusals >= asked.len() {
                        return None;
                    }
                }
                None
            };
            if let Ok(Some(answer)) = timeout(wait, next).await {
                return Some(answer);
            }
            if refusals >= self.servers.len() {
                break;
            }
        }
        refused
    }

    /// Sends a query under an id of its own.
    async fn send(
        &self,
        server: SocketAddr,
        query: &Rc<[u8]>,
        answer: &mpsc::UnboundedSender<Vec<u8>>,
    ) -> io::Result<Ticket> {
        let line = self.line(server.is_ipv6())?;
        let mut id = self.random() as u16;
        loop {
            match line.waiting.borrow_mut().entry(id) {
                Entry::Occupied(_) => id = id.wrapping_add(1),
                Entry::Vacant(free) => {
                    free.insert(Waiting {
                        server,
                        query: query.clone(),
                        answer: answer.clone(),
                    });
                    break;
                }
            }
        }
        let ticket = Ticket {
            line: line.clone(),
            id,
        };
        let mut packet = query.to_vec();
        packet[..2].copy_from_slice(&id.to_be_bytes());
        line.socket.send_to(&packet, server).await?;
        Ok(ticket)
    }

    /// A socket, chosen at random; worn ones are replaced.
    fn line(&self, v6: bool) -> io::Result<Rc<Line>> {
        let mut sockets = self.sockets.borrow_mut();
        sockets.retain(|l| l.used.get() < WORN);
        let own: Vec<usize> = (0..sockets.len())
            .filter(|i| sockets[*i].v6 == v6)
            .collect();
        let line = if own.len() < SOCKETS {
            let any: IpAddr = match v6 {
                false => Ipv4Addr::UNSPECIFIED.into(),
                true => Ipv6Addr::UNSPECIFIED.into(),
            };
            // The kernel chooses the port at random.
            let socket = std::net::UdpSocket::bind(SocketAddr::new(any, 0))?;
            socket.set_nonblocking(true)?;
            super::serve::widen(&socket);
            let line = Rc::new(Line {
                socket: UdpSocket::from_std(socket)?,
                v6,
                used: Cell::new(0),
                waiting: RefCell::default(),
            });
            tokio::task::spawn_local(receive(Rc::downgrade(&line)));
            sockets.push(line.clone());
            line
        } else {
            sockets[own[self.random() as usize % own.len()]].clone()
        };
        line.used.set(line.used.get() + 1);
        // Half of the ids at most: the free ones stay hard to guess.
        if line.waiting.borrow().len() > usize::from(u16::MAX / 2) {
            return Err(io::Error::other("too many queries wait for an answer"));
        }
        Ok(line)
    }

    /// SipHash under a key that the system gave, over a counter.
    fn random(&self) -> u64 {
        let count = self.count.get();
        self.count.set(count.wrapping_add(1));
        self.seed.hash_one(count)
    }

    async fn over_tcp(&self, query: &[u8]) -> Option<Vec<u8>> {
        let mut refused = None;
        for server in &self.servers {
            let share = self.patience / self.servers.len() as u32;
            match timeout(share, exchange(*server, query)).await {
                Ok(Ok(answer)) if wire::failed(&answer) => refused = Some(answer),
                Ok(Ok(answer)) => return Some(answer),
                _ => {}
            }
        }
        refused
    }
}

/// A place in a line, given up when dropped.
struct Ticket {
    line: Rc<Line>,
    id: u16,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.line.waiting.borrow_mut().remove(&self.id);
    }
}

/// Gives answers to who waits for them, until nobody has the line any more.
async fn receive(line: Weak<Line>) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let Some(here) = line.upgrade() else { return };
        // Looks up now and then whether the line is still wanted.
        let received = timeout(IDLE, here.socket.recv_from(&mut buffer)).await;
        // An error is an earlier packet that could not be delivered: its query runs into its time limit.
        let Ok(Ok((length, from))) = received else {
            continue;
        };
        let answer = &buffer[..length];
        let Some(id) = answer.get(..2).map(|b| u16::from_be_bytes([b[0], b[1]])) else {
            continue;
        };
        let waiting = here.waiting.borrow();
        if let Some(w) = waiting.get(&id)
            && w.server == from
            && wire::answers(answer, &w.query)
        {
            // Nobody is there if another answer came first.
            let _ = w.answer.send(answer.to_vec());
        }
    }
}

async fn exchange(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes(), query].concat())
        .await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    if answer.get(..2) != query.get(..2) || !wire::answers(&answer, query) {
        return Err(io::Error::other("not an answer to this query"));
    }
    Ok(answer)
}

/// Time after which a silent resolver is not waited for alone.
const RETRY: Duration = Duration::from_millis(1500);
/// Sockets of a family; together with ids, ports make answers hard to forge.
const SOCKETS: usize = 16;
/// Queries after which a socket is replaced.
const WORN: u32 = 4096;
const IDLE: Duration = Duration::from_secs(10);
