//! The cluster's name server: `service.namespace.svc.cluster.local` and what Kubernetes' DNS specification adds to it.
//!
//! It answers for services (their address), headless services (their ready pods, and each by its host name), external
//! names, and the hosts of ServiceEntries, which stand for names that a real cluster's resolver would find outside.
//! It asks nobody: other names do not exist.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Addresses(Vec<Ipv4Addr>),
    /// Another name.
    Alias(String),
}

/// Names in lower case without the last dot; `*.example.com` stands for every name below it.
#[derive(Debug, Default)]
pub(crate) struct Table {
    names: HashMap<String, Answer>,
    turn: usize,
}

/// The table that the server and its owner share.
pub(crate) type SharedTable = Rc<RefCell<Table>>;

impl Table {
    pub(crate) fn replace(&mut self, names: HashMap<String, Answer>) {
        self.names = names;
    }

    /// `None` where the name does not exist; an empty list where it does but has no address now.
    fn look_up(&self, name: &str) -> Option<&Answer> {
        if let Some(found) = self.names.get(name) {
            return Some(found);
        }
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(found) = self.names.get(&format!("*.{parent}")) {
                return Some(found);
            }
            rest = parent;
        }
        None
    }

    /// The reply to a query; `None` where it is not one.
    fn reply(&mut self, query: &[u8], limit: usize) -> Option<Vec<u8>> {
        let question = Question::read(query)?;
        let mut answers = Vec::new();
        let mut code = CODE_OK;
        let mut name = question.name.clone();
        let mut owner = vec![0xc0, 12];
        for _ in 0..8 {
            match self.look_up(&name) {
                None => {
                    // A name that is only the end of others exists, without addresses: resolvers must not give up on it.
                    let suffix = format!(".{name}");
                    if answers.is_empty() && !self.names.keys().any(|k| k.ends_with(&suffix)) {
                        code = CODE_NO_SUCH_NAME;
                    }
                    break;
                }
                Some(Answer::Alias(target)) => {
                    let data = encode_name(target);
                    answers.push(record(&owner, TYPE_CNAME, &data));
                    name = target.to_ascii_lowercase();
                    owner = data;
                }
                Some(Answer::Addresses(list)) => {
                    if question.kind == TYPE_A || question.kind == TYPE_ANY {
                        let start = if list.is_empty() {
                            0
                        } else {
                            self.turn % list.len()
                        };
                        for address in list[start..].iter().chain(&list[..start]) {
                            answers.push(record(&owner, TYPE_A, &address.octets()));
                        }
                    }
                    break;
                }
            }
        }
        self.turn = self.turn.wrapping_add(1);
        let mut out = Vec::with_capacity(512);
        out.extend_from_slice(&query[..2]);
        // A response, authoritative, recursion as asked and available.
        out.extend_from_slice(&[0x84 | (query[2] & 0x01), 0x80 | code]);
        out.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&query[12..question.end]);
        let mut written: u16 = 0;
        for a in &answers {
            if out.len() + a.len() > limit {
                // Truncated: the client asks again over TCP.
                out[2] |= 0x02;
                break;
            }
            out.extend_from_slice(a);
            written += 1;
        }
        out[6..8].copy_from_slice(&written.to_be_bytes());
        Some(out)
    }
}

struct Question {
    name: String,
    kind: u16,
    /// The offset after the question.
    end: usize,
}

impl Question {
    fn read(query: &[u8]) -> Option<Self> {
        // A query (not an answer), standard, with one question.
        if query.len() < 17 || query[2] & 0xf8 != 0 || query[4..6] != [0, 1] {
            return None;
        }
        let mut name = String::new();
        let mut at = 12;
        loop {
            let length = usize::from(*query.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            if length > 63 {
                return None;
            }
            if !name.is_empty() {
                name.push('.');
            }
            name.push_str(
                &String::from_utf8_lossy(query.get(at..at + length)?).to_ascii_lowercase(),
            );
            at += length;
        }
        let kind = u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?);
        query.get(at + 2..at + 4)?;
        Some(Self {
            name,
            kind,
            end: at + 4,
        })
    }
}

fn record(owner: &[u8], kind: u16, data: &[u8]) -> Vec<u8> {
    let mut out = owner.to_vec();
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&[0, 1]);
    out.extend_from_slice(&TTL.to_be_bytes());
    out.extend_from_slice(&(data.len() as u16).to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn encode_name(name: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len() + 2);
    for label in name.split('.').filter(|l| !l.is_empty()) {
        let label = &label.as_bytes()[..label.len().min(63)];
        out.push(label.len() as u8);
        out.extend_from_slice(label);
    }
    out.push(0);
    out
}

/// Serves both transports until the sockets fail. Binds in the namespace of the calling thread.
pub(crate) async fn serve(table: SharedTable, address: SocketAddr) -> io::Result<()> {
    let udp = UdpSocket::bind(address).await?;
    let tcp = TcpListener::bind(address).await?;
    let over_tcp = async {
        loop {
            let (stream, _) = tcp.accept().await?;
            let table = table.clone();
            tokio::task::spawn_local(async move {
                // A client that breaks off is its own business.
                let _ = serve_stream(stream, &table).await;
            });
        }
    };
    let over_udp = async {
        let mut buffer = [0; 4096];
        loop {
            let (length, client) = udp.recv_from(&mut buffer).await?;
            let reply = table.borrow_mut().reply(&buffer[..length], 512);
            if let Some(reply) = reply {
                let _ = udp.send_to(&reply, client).await;
            }
        }
    };
    tokio::select! { r = over_tcp => r, r = over_udp => r }
}

async fn serve_stream(mut stream: TcpStream, table: &SharedTable) -> io::Result<()> {
    loop {
        let length = match stream.read_u16().await {
            Ok(length) => usize::from(length),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        let mut query = vec![0; length];
        stream.read_exact(&mut query).await?;
        let reply = table.borrow_mut().reply(&query, usize::from(u16::MAX));
        let Some(reply) = reply else { return Ok(()) };
        stream.write_u16(reply.len() as u16).await?;
        stream.write_all(&reply).await?;
    }
}

/// Seconds; short, since headless services change with their pods.
const TTL: u32 = 5;
const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_ANY: u16 = 255;
const CODE_OK: u8 = 0;
const CODE_NO_SUCH_NAME: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut q = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        q.extend(encode_name(name));
        q.extend(kind.to_be_bytes());
        q.extend([0, 1]);
        q
    }

    fn table() -> Table {
        let mut t = Table::default();
        t.replace(HashMap::from([
            (
                "web.a.svc.cluster.local".into(),
                Answer::Addresses(vec![Ipv4Addr::new(10, 96, 0, 7)]),
            ),
            (
                "db.a.svc.cluster.local".into(),
                Answer::Addresses((0..60).map(|n| Ipv4Addr::new(10, 244, 1, n)).collect()),
            ),
            (
                "*.example.com".into(),
                Answer::Addresses(vec![Ipv4Addr::new(240, 240, 0, 1)]),
            ),
            (
                "ext.a.svc.cluster.local".into(),
                Answer::Alias("web.a.svc.cluster.local".into()),
            ),
        ]));
        t
    }

    #[test]
    fn a_service_answers_with_its_address_in_any_case() {
        let reply = table()
            .reply(&query("WEB.a.svc.cluster.local", TYPE_A), 512)
            .unwrap();
        assert_eq!(reply[..4], [0xab, 0xcd, 0x85, 0x80]);
        assert_eq!(reply[6..8], [0, 1]);
        assert!(reply.ends_with(&[0, 4, 10, 96, 0, 7]));
    }

    #[test]
    fn other_record_types_of_a_known_name_are_empty_and_not_missing() {
        let reply = table()
            .reply(&query("web.a.svc.cluster.local", 28), 512)
            .unwrap();
        assert_eq!((reply[3] & 0x0f, &reply[6..8]), (CODE_OK, &[0, 0][..]));
        let reply = table()
            .reply(&query("a.svc.cluster.local", TYPE_A), 512)
            .unwrap();
        assert_eq!((reply[3] & 0x0f, &reply[6..8]), (CODE_OK, &[0, 0][..]));
    }

    #[test]
    fn unknown_names_do_not_exist_and_wildcards_do() {
        let reply = table()
            .reply(&query("nope.a.svc.cluster.local", TYPE_A), 512)
            .unwrap();
        assert_eq!(reply[3] & 0x0f, CODE_NO_SUCH_NAME);
        let reply = table()
            .reply(&query("a.b.example.com", TYPE_A), 512)
            .unwrap();
        assert!(reply.ends_with(&[240, 240, 0, 1]));
    }

    #[test]
    fn an_alias_comes_with_its_target() {
        let reply = table()
            .reply(&query("ext.a.svc.cluster.local", TYPE_A), 512)
            .unwrap();
        assert_eq!(reply[6..8], [0, 2]);
        assert!(reply.ends_with(&[10, 96, 0, 7]));
    }

    #[test]
    fn what_does_not_fit_is_marked_truncated() {
        let reply = table()
            .reply(&query("db.a.svc.cluster.local", TYPE_A), 512)
            .unwrap();
        assert!(reply.len() <= 512 && reply[2] & 0x02 != 0);
        let whole = table()
            .reply(&query("db.a.svc.cluster.local", TYPE_A), 65535)
            .unwrap();
        assert_eq!(whole[6..8], [0, 60]);
    }

    #[test]
    fn rubbish_gets_no_answer() {
        assert_eq!(table().reply(&[0; 5], 512), None);
        assert_eq!(table().reply(&[0xff; 40], 512), None);
    }
}
