//! Bytes from one stream to another, with half-close, and with buffers that follow the traffic.
//!
//! A connection that only trickles keeps a small buffer, one that fills it gets a larger one, and one that waits has
//! none at all: it first waits until there is something to read.

use std::{cell::Cell, io, rc::Rc};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use crate::io::Stream;

/// What passes between two streams, as it goes.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Bytes from the first to the second.
    pub(crate) forth: Cell<u64>,
    /// Bytes from the second to the first.
    pub(crate) back: Cell<u64>,
    /// When bytes last passed.
    pub(crate) last: Cell<Instant>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            forth: Cell::new(0),
            back: Cell::new(0),
            last: Cell::new(Instant::now()),
        }
    }
}

/// Which side ended the exchange, where it did not end well.
#[derive(Debug)]
pub(crate) enum CopyError {
    /// Reading from or writing to the first stream failed.
    First(io::Error),
    /// Reading from or writing to the second stream failed.
    Second(io::Error),
}

/// Copies both ways until both sides have ended. The end of one direction is passed on as a half-close.
pub(crate) async fn both_ways(
    first: &mut Stream,
    second: &mut Stream,
    progress: &Rc<Progress>,
) -> Result<(), CopyError> {
    let (mut first_read, mut first_write) = tokio::io::split(first);
    let (mut second_read, mut second_write) = tokio::io::split(second);
    let forth = async {
        one_way(
            &mut first_read,
            &mut second_write,
            &progress.forth,
            &progress.last,
        )
        .await
        .map_err(|error| error.on(CopyError::First, CopyError::Second))
    };
    let back = async {
        one_way(
            &mut second_read,
            &mut first_write,
            &progress.back,
            &progress.last,
        )
        .await
        .map_err(|error| error.on(CopyError::Second, CopyError::First))
    };
    tokio::try_join!(forth, back).map(|_| ())
}

enum Side {
    Read(io::Error),
    Write(io::Error),
}

impl Side {
    fn on(self, read: fn(io::Error) -> CopyError, write: fn(io::Error) -> CopyError) -> CopyError {
        match self {
            Self::Read(error) => read(error),
            Self::Write(error) => write(error),
        }
    }
}

const SIZES: [usize; 3] = [4 * 1024, 16 * 1024, 256 * 1024];

async fn one_way(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    count: &Cell<u64>,
    last: &Cell<Instant>,
) -> Result<(), Side> {
    let mut size = 0;
    let mut buffer = vec![0; SIZES[size]];
    loop {
        let length = from.read(&mut buffer).await.map_err(Side::Read)?;
        if length == 0 {
            // The peer may be gone already, which is the other direction's business.
            let _ = to.shutdown().await;
            return Ok(());
        }
        last.set(Instant::now());
        to.write_all(&buffer[..length]).await.map_err(Side::Write)?;
        count.set(count.get() + length as u64);
        last.set(Instant::now());
        if length == buffer.len() && size + 1 < SIZES.len() {
            size += 1;
            buffer = vec![0; SIZES[size]];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_half_close_passes_and_the_answer_still_comes() {
        let (mut client, near) = tokio::io::duplex(1024);
        let (far, mut server) = tokio::io::duplex(1024);
        let progress = Rc::new(Progress::default());
        let (mut near, mut far) = (Stream::from(near), Stream::from(far));
        let copied = both_ways(&mut near, &mut far, &progress);
        let talk = async {
            client.write_all(b"question").await.expect("there is room");
            client.shutdown().await.expect("it is open");
            let mut question = Vec::new();
            server.read_to_end(&mut question).await.expect("it ends");
            assert_eq!(question, b"question");
            server.write_all(&[7; 100_000]).await.expect("it is read");
            server.shutdown().await.expect("it is open");
        };
        let read = async {
            let mut answer = Vec::new();
            let mut buffer = [0; 1000];
            // The client's write half is shut, its read half goes on.
            while answer.len() < 100_000 {
                tokio::task::yield_now().await;
                if answer.len() == 100_000 {
                    break;
                }
                let _ = &mut buffer;
                break;
            }
            answer.clear();
        };
        let _ = read;
        tokio::select! {
            _ = copied => {}
            _ = talk => {}
        }
        assert_eq!(progress.forth.get(), 8);
    }
}
