//! A connection on which streams come in.

use std::{
    future::poll_fn,
    hash::{BuildHasher, RandomState},
    rc::Rc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Facts, Reader, Reason, Settings, Writer,
    connection::{Connection, Event},
    core::{Core, Role},
    fate::Fate,
    keepalive::Pinger,
    linger,
    stream::Handle,
};
use crate::{Error, RequestHead};

/// One HTTP/2 connection, server side. It makes progress only while `accept` is awaited; streams
/// run in tasks of their own.
#[derive(Debug)]
pub struct ServerConnection<S> {
    connection: Connection<S>,
    facts: Rc<Facts>,
    pinger: Option<Pinger>,
    lingering: linger::Timer,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ServerConnection<S> {
    /// Reads the client's preface and says our settings.
    ///
    /// # Errors
    /// The peer does not speak HTTP/2, or the connection broke.
    pub async fn handshake(mut io: S, settings: &Settings) -> Result<Self, Error> {
        let mut preface = [0; super::PREFACE.len()];
        tokio::io::AsyncReadExt::read_exact(&mut io, &mut preface).await?;
        if preface != super::PREFACE {
            return Err(Error::Reset(Reason::PROTOCOL_ERROR));
        }
        let core = Core::new(Role::Server, settings);
        let facts = core.facts.clone();
        let connection = Connection::new(io, core);
        let pinger = settings.keep_alive.map(|options| {
            let seed = RandomState::new().hash_one(0);
            Pinger::new(options, &facts, seed)
        });
        Ok(ServerConnection {
            connection,
            facts,
            pinger,
            lingering: linger::Timer::default(),
        })
    }

    /// The next stream; `None` when the connection is over, and the client has closed it, too: whoever does not wait for
    /// that looks at [`ServerConnection::is_ending`]. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The connection broke, or the peer broke the protocol.
    pub async fn accept(&mut self) -> Result<Option<(RequestHead, Reader, Writer)>, Error> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    /// [`ServerConnection::accept`], to be used beside a timer.
    #[allow(clippy::type_complexity)]
    pub fn poll_accept(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<(RequestHead, Reader, Writer)>, Error>> {
        if let Some(pinger) = &mut self.pinger
            && pinger
                .poll(cx, &mut self.connection.core.borrow_mut())
                .is_ready()
        {
            self.connection.core.borrow_mut().lose(Fate::Unresponsive);
            return Poll::Ready(Err(Error::Unresponsive));
        }
        let event = loop {
            if let Poll::Ready(event) = self.connection.poll(cx) {
                break event;
            }
            let core = &mut self.connection.core.borrow_mut();
            ready!(self.lingering.poll(cx, core));
        };
        match event {
            Event::Opened((place, head)) => {
                let shared = &self.connection.core;
                let core = &mut *shared.borrow_mut();
                let reader = Reader::new(Handle::new(shared, core, place));
                let writer = Writer::response(Handle::new(shared, core, place));
                Poll::Ready(Ok(Some((head, reader, writer))))
            }
            Event::Over(result) => Poll::Ready(result.map(|()| None)),
        }
    }

    /// What has passed.
    pub fn facts(&self) -> &Rc<Facts> {
        &self.facts
    }

    /// Says GOAWAY for a reason: all streams end, and the connection with them as soon as the
    /// peer was told. Go on to accept until that is so.
    pub fn end(&mut self, reason: Reason) {
        self.connection.core.borrow_mut().end(reason, Ok(()));
    }

    /// Whether the connection only waits for the peer to take its end, and to close.
    pub fn is_ending(&self) -> bool {
        self.connection.core.borrow().ending.is_some()
    }

    /// Says GOAWAY: streams that run may end, new ones are refused, then the connection closes.
    pub fn drain(&mut self) {
        self.connection.core.borrow_mut().drain();
    }

    /// The second step of [`ServerConnection::drain`], for a client that does not answer the first: streams that it
    /// makes from now on are refused.
    pub fn leave(&mut self) {
        self.connection.core.borrow_mut().leave();
    }

    /// Whether any stream is open.
    pub fn has_streams(&self) -> bool {
        self.connection.core.borrow().store.open_count() > 0
    }
}
