//! A connection on which we open streams.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    hash::{BuildHasher, RandomState},
    rc::Rc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Facts, Reader, Settings, Writer,
    connection::{Connection, Event},
    core::{Core, Role},
    fate::Fate,
    fields_out,
    keepalive::Pinger,
    stream::Handle,
};
use crate::{Error, Framing, Method, Refusal, RequestHead, ResponseHead};

/// Begins to speak HTTP/2 with prior knowledge. The future that is returned drives the connection
/// and ends with it; whoever connects spawns it.
///
/// # Errors
/// None: what the peer speaks is seen by the driver.
pub async fn connect<S>(
    io: S,
    settings: &Settings,
) -> Result<
    (
        ClientHandle,
        impl Future<Output = Result<(), Error>> + use<S>,
    ),
    Error,
>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let core = Core::new(Role::Client, settings);
    let facts = core.facts.clone();
    let mut pinger = settings.keep_alive.map(|options| {
        let seed = RandomState::new().hash_one(0);
        Pinger::new(options, &facts, seed)
    });
    let mut connection = Connection::new(io, core);
    let handle = ClientHandle::new(&connection.core, &facts);
    let driver = async move {
        poll_fn(|cx| {
            if let Some(pinger) = &mut pinger
                && pinger
                    .poll(cx, &mut connection.core.borrow_mut())
                    .is_ready()
            {
                connection.core.borrow_mut().lose(Fate::Unresponsive);
                return Poll::Ready(Err(Error::Unresponsive));
            }
            match connection.poll(cx) {
                Poll::Ready(Event::Over(Ok(()))) if facts.flood().is_some() => {
                    Poll::Ready(Err(FLOOD.into()))
                }
                Poll::Ready(Event::Over(result)) => Poll::Ready(result),
                // Only servers hand out streams that the peer has opened.
                Poll::Ready(Event::Opened(_)) | Poll::Pending => Poll::Pending,
            }
        })
        .await
    };
    Ok((handle, driver))
}

const FLOOD: Refusal = Refusal {
    status: 502,
    detail: "http2.inbound_flood",
};

/// Opens streams on one connection; clones share it.
#[derive(Debug)]
pub struct ClientHandle {
    core: Rc<RefCell<Core>>,
    facts: Rc<Facts>,
}

impl ClientHandle {
    fn new(core: &Rc<RefCell<Core>>, facts: &Rc<Facts>) -> ClientHandle {
        core.borrow_mut().handles += 1;
        ClientHandle {
            core: core.clone(),
            facts: facts.clone(),
        }
    }

    /// Resolves when the peer would take another stream; an error when the connection is over or
    /// being drained.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let mut core = self.core.borrow_mut();
        if core.is_over() {
            return Poll::Ready(Err(match core.ending {
                Some(Err(fate)) => fate.into(),
                _ => Error::Unprocessed,
            }));
        }
        if core.store.open_count() < core.peer.concurrent_streams as usize {
            return Poll::Ready(Ok(()));
        }
        // A task may look more often than it is woken.
        if !core
            .openers
            .iter()
            .any(|opener| opener.will_wake(cx.waker()))
        {
            core.openers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// [`ClientHandle::poll_ready`] as a future.
    ///
    /// # Errors
    /// The connection takes no more streams.
    pub async fn ready(&mut self) -> Result<(), Error> {
        poll_fn(|cx| self.poll_ready(cx)).await
    }

    /// Streams that the peer lets us have open.
    pub fn max_streams(&self) -> usize {
        self.core.borrow().peer.concurrent_streams as usize
    }

    /// Whether the peer takes extended CONNECT (RFC 8441).
    pub fn takes_extended_connect(&self) -> bool {
        self.core.borrow().peer.extended_connect
    }

    /// What has passed on the connection.
    pub fn facts(&self) -> &Rc<Facts> {
        &self.facts
    }

    /// Opens a stream; only after [`ClientHandle::poll_ready`].
    ///
    /// # Errors
    /// The head cannot be said in HTTP/2; or the connection is over or full, so that nothing was
    /// sent.
    pub fn send(&mut self, head: &RequestHead, framing: Framing) -> Result<ClientStream, Error> {
        fields_out::check_request(head)?;
        let ended = framing.is_none() && !head.upgrade;
        let core = &mut *self.core.borrow_mut();
        let id = core.next_out;
        if core.is_over() || core.store.open_count() >= core.peer.concurrent_streams as usize {
            return Err(Error::Unprocessed);
        }
        core.next_out += 2;
        let place = core.open(id);
        let stream = core.store.get(place);
        stream.bodiless = head.method == Method::Head;
        stream.upgrade = head.upgrade;
        let reading = Handle::new(&self.core, core, place);
        let writing = Handle::new(&self.core, core, place);
        core.put_block(place, ended, |encoder, out| {
            fields_out::write_request(encoder, head, framing, out);
        });
        self.facts.opened.set(self.facts.opened.get() + 1);
        Ok(ClientStream {
            handle: reading,
            writer: Writer::body(writing, ended),
            upgrade: head.upgrade,
        })
    }
}

impl Clone for ClientHandle {
    fn clone(&self) -> ClientHandle {
        ClientHandle::new(&self.core, &self.facts)
    }
}

impl Drop for ClientHandle {
    fn drop(&mut self) {
        let mut core = self.core.borrow_mut();
        core.handles -= 1;
        if core.is_done() {
            core.wake();
        }
    }
}

/// One stream: the request's body to write, the response to read.
#[derive(Debug)]
pub struct ClientStream {
    handle: Handle,
    /// The request's body.
    pub writer: Writer,
    upgrade: bool,
}

impl ClientStream {
    /// The reading and the writing half.
    pub fn split(self) -> (ResponseReader, Writer) {
        let reader = ResponseReader {
            handle: self.handle,
            upgrade: self.upgrade,
            bare: false,
        };
        (reader, self.writer)
    }
}

/// Reads the response's heads.
#[derive(Debug)]
pub struct ResponseReader {
    handle: Handle,
    upgrade: bool,
    bare: bool,
}

impl ResponseReader {
    /// The next head; informational ones come first, without a body.
    ///
    /// # Errors
    /// The stream was reset, or the connection broke.
    pub async fn read_head(&mut self) -> Result<(ResponseHead, Option<Reader>), Error> {
        poll_fn(|cx| self.poll_head(cx)).await
    }

    /// Whether the final head came with the end of the stream, so that nothing was ever to follow it.
    pub fn is_bare(&self) -> bool {
        self.bare
    }

    /// [`ResponseReader::read_head`], to be used beside other things.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(ResponseHead, Option<Reader>), Error>> {
        let mut head = {
            let mut core = self.handle.core();
            let stream = core.store.get(self.handle.place());
            match (stream.heads.pop_front(), stream.fate) {
                (Some(head), _) => head,
                (None, Some(fate)) => return Poll::Ready(Err(fate.into())),
                (None, None) => {
                    stream.wait_to_read(cx);
                    return Poll::Pending;
                }
            }
        };
        if head.is_informational() {
            return Poll::Ready(Ok((head, None)));
        }
        self.bare = head.framing.is_none();
        if self.upgrade && (200..300).contains(&head.status) {
            head.framing = Framing::Tunnel;
        }
        Poll::Ready(Ok((head, Some(Reader::new(self.handle.again())))))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::frame::MAX, *};

    #[tokio::test]
    async fn a_task_that_looks_often_waits_once() {
        let (near, _far) = tokio::io::duplex(1024);
        let (mut handle, _driver) = connect(near, &Settings::default()).await.unwrap();
        handle.core.borrow_mut().peer.concurrent_streams = 0;
        for _ in 0..3 {
            let pending = poll_fn(|cx| Poll::Ready(handle.poll_ready(cx).is_pending()));
            assert!(pending.await);
        }
        assert_eq!(handle.core.borrow().openers.len(), 1);
    }

    #[tokio::test]
    async fn a_connection_without_identifiers_is_over() {
        let (near, _far) = tokio::io::duplex(1024);
        let (mut handle, _driver) = connect(near, &Settings::default()).await.unwrap();
        handle.ready().await.unwrap();
        handle.core.borrow_mut().next_out = MAX + 2;
        assert!(handle.ready().await.unwrap_err().is_unprocessed());
    }
}
