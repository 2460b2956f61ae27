//! The upstream end of a proxied connection: a connection to a host, or a tunnel through it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use serde_json::Value;
use tls::session::Session;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{copy::End, tunnel::Carried};
use crate::{
    cluster::{Established, RequestGuard, UpstreamAccount},
    io::Stream,
};

/// Bytes to a host and back, with what counts them.
pub(super) struct Connected {
    pub(super) stream: Upstream,
    pub(super) holder: Holder,
    /// Counts it as under way.
    pub(super) _request: RequestGuard,
}

/// Where the bytes go.
pub(super) enum Upstream {
    /// To the connection as they are.
    Plain(Stream),
    /// Into the bodies of a request and its response; in a box, since few do.
    Carried(Box<Carried>),
}

/// Who keeps the counts of an upstream connection.
pub(super) enum Holder {
    /// It carries this connection alone.
    Own(UpstreamAccount),
    /// Its pool; bytes count there, too.
    Shared(Established),
}

impl Upstream {
    /// What TLS agreed on.
    pub(super) fn session(&self) -> Option<&Arc<Session>> {
        match self {
            Self::Plain(stream) => stream.session(),
            Self::Carried(carried) => carried.session(),
        }
    }

    /// Who the host is, by Istio's metadata exchange.
    pub(super) fn peer(&self) -> Option<&Arc<Value>> {
        match self {
            Self::Plain(stream) => stream.peer(),
            Self::Carried(carried) => carried.peer(),
        }
    }

    /// Makes its close a reset.
    pub(super) fn reset_on_close(&self) {
        match self {
            Self::Plain(stream) => stream.reset_on_close(),
            Self::Carried(carried) => carried.reset_on_close(),
        }
    }
}

impl Holder {
    /// How the connection came to be.
    pub(super) fn established(&self) -> Established {
        match self {
            Self::Own(account) => account.established(),
            Self::Shared(established) => *established,
        }
    }

    /// Says whether the host has ended the connection, where what passed on it was all there was.
    pub(super) fn ended(&self, remote: bool) {
        if let Self::Own(account) = self {
            account.ended(remote);
        }
    }
}

impl End for Upstream {
    fn plain_tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(stream) => stream.plain_tcp(),
            Self::Carried(_) => None,
        }
    }
}

impl AsyncRead for Upstream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Carried(carried) => carried.poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Upstream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, buffer),
            Self::Carried(carried) => carried.poll_write(context, buffer),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            // A write is over when the bytes are on their way.
            Self::Carried(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Carried(carried) => carried.poll_shutdown(context),
        }
    }
}
