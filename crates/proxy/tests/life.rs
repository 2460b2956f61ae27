//! How the process ends: what clients see of SIGTERM, and when it is gone. Each test runs a proxy of its own in a process
//! of its own, which is this program again.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use testkit::frames::{DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, SETTINGS, frame};

/// No test: the process that the others start.
#[test]
fn the_proxy() {
    let Ok(arguments) = env::var(ARGUMENTS) else {
        return;
    };
    let arguments = arguments.split('\n').map(Into::into).collect();
    let good = outrigger_proxy::command::main(arguments) == ExitCode::SUCCESS;
    std::process::exit(if good { 0 } else { 1 });
}

const ARGUMENTS: &str = "OUTRIGGER_TEST_ARGUMENTS";

/// Long enough that a test which waits for it has failed.
const LONG: u64 = 600;

#[test]
fn what_is_under_way_at_sigterm_is_finished() {
    let origin = Origin::new();
    let mut proxy = Proxy::start(&origin, LONG, "");
    let mut client = proxy.client();
    client.say(GET_IT);
    let asked = origin.next();
    proxy.signal(Signal::SIGTERM);
    proxy.says("draining");
    // Others are told to go elsewhere; those who come all the same are served.
    assert!(proxy.admin("/ready").starts_with("HTTP/1.1 503 "));
    let mut late = proxy.client();
    late.say(GET_IT);
    for (client, asked) in [(&mut late, origin.next()), (&mut client, asked)] {
        asked.answer();
        let answer = client.rest().expect("a clean end");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
    }
    assert!(proxy.end().success());
    // What was collected for the log is written.
    assert_eq!(proxy.log(), "GET 200 -\nGET 200 -\n");
}

#[test]
fn streams_that_are_open_at_sigterm_are_finished_after_the_goaway() {
    let origin = Origin::new();
    let mut proxy = Proxy::start(&origin, LONG, "");
    let mut client = proxy.client();
    client
        .0
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .expect("it is open");
    client.frame(SETTINGS, 0, 0, &[]);
    client.frame(HEADERS, END_HEADERS | END_STREAM, 1, GET);
    let asked = origin.next();
    proxy.signal(Signal::SIGTERM);
    let (_, _, first) = client.find(GOAWAY);
    assert_eq!(first[..8], [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let (flags, _, ping) = client.find(PING);
    assert_eq!(flags, 0);
    client.frame(PING, 1, 0, &ping);
    let (_, _, last) = client.find(GOAWAY);
    assert_eq!(last[..8], [0, 0, 0, 1, 0, 0, 0, 0]);
    asked.answer();
    let (_, stream, body) = client.find(DATA);
    assert_eq!((stream, &*body), (1, &b"ok"[..]));
    assert!(proxy.end().success());
}

#[test]
fn clients_at_rest_do_not_keep_the_process() {
    let origin = Origin::new();
    let mut proxy = Proxy::start(&origin, LONG, "drain_timeout: 0.2s");
    let mut rests = proxy.client();
    rests.say(GET_IT);
    origin.next().answer();
    assert!(rests.head().starts_with("HTTP/1.1 200 "));
    // Neither who has not said anything yet, nor who has said half of a preface.
    let mut silent = proxy.client();
    let mut begins = proxy.client();
    begins.say("PRI * HT");
    proxy.signal(Signal::SIGTERM);
    assert!(proxy.end().success());
    assert_eq!(rests.rest().as_deref(), Some("ok"));
    assert_eq!(silent.rest().as_deref(), Some(""));
    begins.rest();
}

#[test]
fn the_drain_time_is_the_most() {
    let origin = Origin::new();
    let mut proxy = Proxy::start(&origin, 1, "");
    let mut client = proxy.client();
    client.say(GET_IT);
    let _never_answered = origin.next();
    let begun = Instant::now();
    proxy.signal(Signal::SIGTERM);
    assert!(proxy.end().success());
    assert!(begun.elapsed() >= Duration::from_secs(1));
    assert_ne!(client.rest().as_deref(), Some("ok"));
    assert_eq!(
        proxy.log().lines().count(),
        1,
        "a request that was cut is told, too"
    );
}

#[test]
fn a_second_signal_ends_at_once_and_so_does_sigint() {
    for signals in [
        &[Signal::SIGTERM, Signal::SIGTERM][..],
        &[Signal::SIGTERM, Signal::SIGINT],
        &[Signal::SIGINT],
    ] {
        let origin = Origin::new();
        let mut proxy = Proxy::start(&origin, LONG, "");
        let mut client = proxy.client();
        client.say(GET_IT);
        let _never_answered = origin.next();
        for signal in signals {
            proxy.signal(*signal);
            proxy.says("caught");
        }
        assert!(proxy.end().success(), "{signals:?}");
    }
}

const GET_IT: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";

/// A process that serves HTTP from one origin.
struct Proxy {
    process: Child,
    output: BufReader<std::process::ChildStderr>,
    listener: SocketAddr,
    admin: SocketAddr,
    home: TempDir,
}

impl Proxy {
    fn start(origin: &Origin, drain_seconds: u64, options: &str) -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let (config, admin) = (home.path().join("c.yaml"), home.path().join("admin"));
        let (log, port) = (home.path().join("access.log"), origin.port());
        std::fs::write(&config, bootstrap(&log, port, options)).expect("it can be written");
        let drain_seconds = drain_seconds.to_string();
        let arguments = [
            "envoy",
            "-c",
            &config.display().to_string(),
            "--concurrency",
            "2",
            "--drain-time-s",
            &drain_seconds,
            "--admin-address-path",
            &admin.display().to_string(),
        ]
        .join("\n");
        let mut process = Command::new(env::current_exe().expect("a path"))
            .args(["--exact", "the_proxy", "--nocapture"])
            .env(ARGUMENTS, arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("this program runs");
        let output = BufReader::new(process.stderr.take().expect("a pipe"));
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut proxy = Self {
            process,
            output,
            listener: nowhere,
            admin: nowhere,
            home,
        };
        proxy.says("all clusters and listeners of the bootstrap are there");
        let address = std::fs::read_to_string(admin).expect("admin listens");
        proxy.admin = address.parse().expect("an address");
        let listeners = proxy.admin("/listeners");
        let address = listeners.rsplit("::").next().expect("a listener");
        proxy.listener = address.trim().parse().expect(&listeners);
        proxy
    }

    /// Waits until the process has said this.
    fn says(&mut self, what: &str) {
        let mut line = String::new();
        while !line.contains(what) {
            line.clear();
            let read = self.output.read_line(&mut line).expect("text");
            assert_ne!(read, 0, "the process ended before it said: {what}");
        }
    }

    fn client(&self) -> Client {
        Client::new(self.listener)
    }

    fn admin(&self, path: &str) -> String {
        let mut client = Client::new(self.admin);
        client.say(&format!(
            "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        ));
        client.rest().expect("an answer")
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("it runs");
    }

    /// How it ended; it has far less time than it would drain for.
    fn end(&mut self) -> ExitStatus {
        let late = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.process.try_wait().expect("it is ours") {
                return status;
            }
            assert!(Instant::now() < late, "it goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.home.path().join("access.log")).expect("a log")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It fails where it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn bootstrap(log: &Path, port: u16, options: &str) -> String {
    let types = "type.googleapis.com/envoy.extensions";
    format!(
        "admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  clusters:
  - name: a
    type: STATIC
    load_assignment: {{cluster_name: a, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}
  listeners:
  - name: l
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          \"@type\": {types}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: h
          {options}
          access_log:
          - name: file
            typed_config:
              \"@type\": {types}.access_loggers.file.v3.FileAccessLog
              path: {log}
              log_format: {{text_format_source: {{inline_string: \"%REQ(:METHOD)% %RESPONSE_CODE% %RESPONSE_FLAGS%\\n\"}}}}
          route_config: {{virtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: a}}}}]}}]}}
          http_filters:
          - name: router
            typed_config: {{\"@type\": {types}.filters.http.router.v3.Router}}
",
        log = log.display(),
    )
}

/// A connection to the proxy; what does not come in time fails its test.
struct Client(TcpStream);

impl Client {
    fn new(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("it listens");
        let limit = Some(Duration::from_secs(30));
        stream.set_read_timeout(limit).expect("a limit");
        Self(stream)
    }

    fn say(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).expect("it is open");
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let bytes = frame(kind, flags, stream, payload);
        self.0.write_all(&bytes).expect("it is open");
    }

    /// The next frame of this kind: flags, stream and payload.
    fn find(&mut self, kind: u8) -> (u8, u32, Vec<u8>) {
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).expect("a frame");
            let [a, b, c, found, flags, stream @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            self.0.read_exact(&mut payload).expect("a whole frame");
            if found == kind {
                return (flags, u32::from_be_bytes(stream), payload);
            }
        }
    }

    /// The head of an answer.
    fn head(&mut self) -> String {
        let mut text = String::new();
        while !text.ends_with("\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).expect("a head");
            text.push(byte[0].into());
        }
        text
    }

    /// All that comes until the end; `None` where that is a reset.
    fn rest(&mut self) -> Option<String> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8(bytes).expect("text"))
    }
}

/// A server whose requests the test answers.
struct Origin(TcpListener);

/// A request that waits for its answer.
struct Asked(TcpStream);

impl Origin {
    fn new() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").expect("a port is free"))
    }

    fn port(&self) -> u16 {
        self.0.local_addr().expect("it is bound").port()
    }

    /// The first request of the next connection.
    fn next(&self) -> Asked {
        let (mut stream, _) = self.0.accept().expect("the proxy connects");
        let mut seen = Vec::new();
        while !seen.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a request");
            seen.push(byte[0]);
        }
        Asked(stream)
    }
}

impl Asked {
    fn answer(mut self) {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        self.0.write_all(answer).expect("the proxy waits");
    }
}
