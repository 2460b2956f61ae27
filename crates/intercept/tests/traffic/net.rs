//! Namespaces, peers and callers for tests with real packets.
//!
//! A namespace is a thread that has left the others': a socket belongs to the namespace of the thread that made it,
//! so peers and callers of all namespaces live in this one process. Every TCP peer speaks first and says who it is,
//! which destination it sees and who called.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{getsockopt, sockopt},
    unistd::{Gid, Uid, gettid, setfsgid, setfsuid},
};
use socket2::{Domain, Protocol, Socket, Type};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace.
#[derive(Clone)]
pub(crate) struct Namespace {
    jobs: mpsc::Sender<Job>,
    /// The thread that is in it.
    pub(crate) thread: i32,
}

impl Namespace {
    pub(crate) fn new() -> Namespace {
        let (jobs, list) = mpsc::channel::<Job>();
        let (ready, wait) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            ready.send(gettid().as_raw()).expect("somebody waits");
            for job in list {
                job();
            }
        });
        let thread = wait.recv().expect("a namespace");
        Namespace { jobs, thread }
    }

    /// Runs `f` there, unless a job has broken the namespace's thread: for clean-up.
    pub(crate) fn last<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) {
        let (give, take) = mpsc::channel();
        let job = Box::new(move || drop(give.send(f())));
        if self.jobs.send(job).is_ok() {
            let _ = take.recv();
        }
    }

    /// Runs `f` there.
    pub(crate) fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        let (give, take) = mpsc::channel();
        let job = Box::new(move || {
            let _ = give.send(f());
        });
        self.jobs.send(job).expect("the namespace lives");
        take.recv().expect("the job ends well")
    }

    /// Runs a script there; it must end well.
    pub(crate) fn sh(&self, script: &str) -> String {
        let (out, ok) = self.try_sh(script);
        assert!(ok, "{script}\n{out}");
        out
    }

    /// Runs a script there; its output, and whether it ended well.
    pub(crate) fn try_sh(&self, script: &str) -> (String, bool) {
        let script = script.to_owned();
        self.run(move || {
            let output = Command::new("sh")
                .args(["-c", &script])
                .env("RUN", std::env::current_exe().expect("a path"))
                .output()
                .expect("sh runs");
            let text = [output.stdout, output.stderr].concat();
            (
                String::from_utf8_lossy(&text).into_owned(),
                output.status.success(),
            )
        })
    }

    /// Listens at `at` there, under the name `label`; counts the calls.
    pub(crate) fn peer(
        &self,
        label: &'static str,
        at: SocketAddr,
        transparent: bool,
    ) -> Arc<AtomicUsize> {
        let listener = self.run(move || listen(at, transparent));
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                counted.fetch_add(1, Ordering::Relaxed);
                greet(stream, label);
            }
        });
        count
    }

    /// Answers datagrams at `at` with its name.
    pub(crate) fn udp_peer(&self, label: &'static str, owner: Caller, at: SocketAddr) {
        let socket = self.run(move || {
            let _restore = owner.act();
            UdpSocket::bind(at).expect("an address")
        });
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(label.as_bytes(), from);
            }
        });
    }

    /// Calls `to` and gives what the peer says of itself.
    pub(crate) fn call(&self, caller: Caller, to: SocketAddr) -> String {
        self.run(move || caller.tcp(to))
    }

    /// Sends a datagram and gives the answer.
    pub(crate) fn ask(&self, caller: Caller, to: SocketAddr) -> String {
        self.ask_from(caller, 0, to)
    }

    /// The same from that port.
    pub(crate) fn ask_from(&self, caller: Caller, port: u16, to: SocketAddr) -> String {
        self.run(move || caller.udp(port, to))
    }

    /// A port that nobody has.
    pub(crate) fn free_udp_port(&self) -> u16 {
        self.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("an address");
            socket.local_addr().expect("it is bound").port()
        })
    }
}

/// A cgroup of a pod's own. Only threads are moved there: pods share this process.
pub(crate) struct Cgroup {
    path: PathBuf,
    pod: Namespace,
}

impl Cgroup {
    /// Moves the pod's thread, and so what it makes from now on.
    pub(crate) fn around(pod: &Namespace) -> Cgroup {
        let mount = outrigger_intercept::ebpf::cgroup_mount().expect("cgroup2");
        let path = mount.join(format!(
            "outrigger-test-{}-{}",
            std::process::id(),
            pod.thread
        ));
        fs::create_dir(&path).expect("a cgroup");
        fs::write(path.join("cgroup.type"), "threaded").expect("a threaded cgroup");
        let threads = path.join("cgroup.threads");
        pod.run(move || fs::write(threads, "0").expect("a thread moves"));
        Cgroup {
            path,
            pod: pod.clone(),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let threads = self.path.with_file_name("cgroup.threads");
        self.pod.last(move || fs::write(threads, "0"));
        let _ = fs::remove_dir(&self.path);
    }
}

/// Who calls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The address that the socket is bound to.
    pub(crate) bind: Option<IpAddr>,
    /// The firewall mark of a transparent socket: the address need not be of this machine.
    pub(crate) mark: Option<u32>,
}

impl Caller {
    pub(crate) const ROOT: Caller = Caller {
        uid: 0,
        gid: 0,
        bind: None,
        mark: None,
    };

    pub(crate) fn of((uid, gid): (u32, u32)) -> Caller {
        Caller {
            uid,
            gid,
            bind: None,
            mark: None,
        }
    }

    /// As the proxy calls the app on behalf of a client, in mode TPROXY.
    pub(crate) fn for_client(self, client: IpAddr, mark: u32) -> Caller {
        Caller {
            bind: Some(client),
            mark: Some(mark),
            ..self
        }
    }

    fn act(self) -> Restore {
        setfsgid(Gid::from_raw(self.gid));
        setfsuid(Uid::from_raw(self.uid));
        Restore
    }

    /// A failed call gives the system's word.
    pub(crate) fn tcp(self, to: SocketAddr) -> String {
        let _restore = self.act();
        let call = || -> std::io::Result<String> {
            let domain = Domain::for_address(to);
            let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
            if let Some(mark) = self.mark {
                match to {
                    SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
                    SocketAddr::V6(_) => set_ipv6_transparent(&socket),
                }
                socket.set_mark(mark)?;
            }
            if let Some(ip) = self.bind {
                socket.bind(&SocketAddr::new(ip, 0).into())?;
            }
            socket.connect_timeout(&to.into(), PATIENCE)?;
            let mut stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text.trim().to_owned())
        };
        call().unwrap_or_else(|e| format!("error: {e}"))
    }

    fn udp(self, port: u16, to: SocketAddr) -> String {
        let _restore = self.act();
        let ask = || -> std::io::Result<String> {
            let any: IpAddr = match to {
                SocketAddr::V4(_) => [0, 0, 0, 0].into(),
                SocketAddr::V6(_) => [0; 16].into(),
            };
            let socket = UdpSocket::bind(SocketAddr::new(any, port))?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send(b"?")?;
            let mut buffer = [0; 256];
            let length = socket.recv(&mut buffer)?;
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        };
        ask().unwrap_or_else(|e| format!("error: {e}"))
    }
}

/// Gives the thread its own identity back.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
    }
}

const PATIENCE: Duration = Duration::from_secs(5);

fn listen(at: SocketAddr, transparent: bool) -> TcpListener {
    let socket =
        Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    socket.set_reuse_address(true).expect("an option");
    if at.is_ipv6() {
        socket.set_only_v6(true).expect("an option");
    }
    if transparent && at.is_ipv4() {
        socket.set_ip_transparent_v4(true).expect("NET_ADMIN");
    } else if transparent {
        set_ipv6_transparent(&socket);
    }
    socket.bind(&at.into()).expect("the address is free");
    socket.listen(1024).expect("it listens");
    socket.into()
}

/// Neither nix nor socket2 has this option.
#[allow(unsafe_code)]
fn set_ipv6_transparent(socket: &Socket) {
    let on: libc::c_int = 1;
    // SAFETY: the pointer is to a whole `c_int` that outlives the call, and its size is given.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IPV6,
            libc::IPV6_TRANSPARENT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(rc, 0, "NET_ADMIN");
}

/// `LABEL ORIGINAL-DESTINATION CALLER`.
fn greet(mut stream: TcpStream, label: &str) {
    let Ok(peer) = stream.peer_addr() else { return };
    let local = stream.local_addr().expect("it is connected");
    let original = match local {
        SocketAddr::V4(_) => getsockopt(&stream.as_fd(), sockopt::OriginalDst).map(|a| {
            let ip = std::net::Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr));
            SocketAddr::new(ip.into(), u16::from_be(a.sin_port))
        }),
        SocketAddr::V6(_) => getsockopt(&stream.as_fd(), sockopt::Ip6tOriginalDst).map(|a| {
            let ip = std::net::Ipv6Addr::from(a.sin6_addr.s6_addr);
            SocketAddr::new(ip.into(), u16::from_be(a.sin6_port))
        }),
    };
    let original = original.unwrap_or(local);
    let _ = stream.write_all(format!("{label} {original} {}\n", peer.ip()).as_bytes());
}
