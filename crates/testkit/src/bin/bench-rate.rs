//! A fixed rate of requests, whatever the answers do: latency counts from the moment a request was due.
//!
//!     bench-rate ADDRESS RATE SECONDS
//!
//! Sends `GET /` over connections that stay open, one request on each at a time, and opens one more whenever all are
//! busy. Prints `RESULT requests errors p50 p99 p999`, times in microseconds.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A proxy that is this far behind is not measured but overrun.
const MOST_CONNECTIONS: usize = 1000;

struct Connection {
    stream: TcpStream,
    /// When the request that it carries was due.
    due: Option<Instant>,
    /// Bytes of the answer so far.
    got: Vec<u8>,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, rate, seconds] = &arguments[..] else {
        bail!("usage: bench-rate ADDRESS RATE SECONDS");
    };
    let address: SocketAddr = address.parse().context("not IP:PORT")?;
    let rate: u32 = rate.parse().context("not a rate")?;
    let seconds: u32 = seconds.parse().context("not a number of seconds")?;
    let every = Duration::from_secs(1) / rate;
    let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n");

    let (mut connections, mut times, mut errors) = (Vec::new(), Vec::new(), 0);
    let begun = Instant::now();
    for number in 0..rate * seconds {
        let due = begun + every * number;
        loop {
            let now = Instant::now();
            if now >= due {
                break;
            }
            wait(&mut connections, due - now, &mut times, &mut errors)?;
        }
        let free = connections
            .iter()
            .position(|c: &Connection| c.due.is_none());
        let index = match free {
            Some(index) => index,
            None if connections.len() < MOST_CONNECTIONS => {
                connections.push(connect(address)?);
                connections.len() - 1
            }
            None => {
                errors += 1;
                continue;
            }
        };
        let connection = &mut connections[index];
        connection.due = Some(due);
        if connection.stream.write_all(request.as_bytes()).is_err() {
            errors += 1;
            connections.swap_remove(index);
        }
    }
    // What is still under way may take a second more.
    let end = Instant::now() + Duration::from_secs(1);
    while connections.iter().any(|c| c.due.is_some()) && Instant::now() < end {
        wait(
            &mut connections,
            Duration::from_millis(10),
            &mut times,
            &mut errors,
        )?;
    }
    errors += connections.iter().filter(|c| c.due.is_some()).count();
    times.sort_unstable();
    let at = |per_mille: usize| {
        times
            .get(times.len() * per_mille / 1000)
            .map_or(0, |t: &Duration| t.as_micros())
    };
    println!(
        "RESULT {} {errors} {} {} {}",
        times.len(),
        at(500),
        at(990),
        at(999)
    );
    Ok(())
}

fn connect(address: SocketAddr) -> anyhow::Result<Connection> {
    let stream = TcpStream::connect(address).with_context(|| address.to_string())?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(Connection {
        stream,
        due: None,
        got: Vec::new(),
    })
}

/// Takes the answers that come within a time.
fn wait(
    connections: &mut Vec<Connection>,
    time: Duration,
    times: &mut Vec<Duration>,
    errors: &mut usize,
) -> anyhow::Result<()> {
    let timeout = Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    };
    let mut ready = {
        let mut fds: Vec<_> = connections
            .iter()
            .map(|c| PollFd::new(&c.stream, PollFlags::IN))
            .collect();
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        fds.iter()
            .map(|fd| !fd.revents().is_empty())
            .collect::<Vec<_>>()
    };
    let mut index = connections.len();
    while index > 0 {
        index -= 1;
        if !std::mem::take(&mut ready[index]) {
            continue;
        }
        let connection = &mut connections[index];
        match answer(connection) {
            Ok(true) => times.extend(connection.due.take().map(|due| due.elapsed())),
            Ok(false) => {}
            Err(_) => {
                *errors += usize::from(connection.due.is_some());
                connections.swap_remove(index);
            }
        }
    }
    Ok(())
}

/// Reads; true where an answer is whole.
fn answer(connection: &mut Connection) -> anyhow::Result<bool> {
    let mut buffer = [0; 1 << 14];
    loop {
        match connection.stream.read(&mut buffer) {
            Ok(0) => bail!("closed"),
            Ok(n) => connection.got.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e.into()),
        }
    }
    let Some(head) = connection.got.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Ok(false);
    };
    let text = std::str::from_utf8(&connection.got[..head])?.to_ascii_lowercase();
    if !text.starts_with("http/1.1 200") {
        bail!("not 200");
    }
    let length: usize = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .context("no length")?
        .trim()
        .parse()?;
    let whole = connection.got.len() >= head + 4 + length;
    if whole {
        connection.got.clear();
    }
    Ok(whole)
}
