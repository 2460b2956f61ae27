//! Hosts whose protocol ALPN decides (`auto_config`): the first connection finds it out.

use std::rc::Rc;

use tokio::time::Instant;

use super::{
    connect::{Upstream, connect},
    error::UpstreamError,
    pool::{Acquire, HostPool, Pending},
    shared::Permit,
};

impl HostPool {
    /// Whether the host speaks HTTP/2. The connection that tells is kept for the requests that ask.
    pub(crate) async fn negotiated_http2(
        self: &Rc<Self>,
        with: Acquire<'_>,
    ) -> Result<bool, UpstreamError> {
        match self.http2_negotiated.get() {
            Some(http2) => Ok(http2),
            // Few requests come here, and none should carry the state of connecting with it.
            None => Box::pin(self.negotiate_http2(with)).await,
        }
    }

    async fn negotiate_http2(self: &Rc<Self>, with: Acquire<'_>) -> Result<bool, UpstreamError> {
        loop {
            if let Some(http2) = self.http2_negotiated.get() {
                return Ok(http2);
            }
            // One attempt at a time, as for HTTP/2: the others most likely fit on what it brings.
            if self.http2_connecting.get() == 0 {
                break;
            }
            self.http2_changed.notified().await;
        }
        let _pending = Pending::acquire(with)?;
        let permit = Permit::acquire(&with.breaker.connections, with.thresholds.max_connections)
            .unwrap_or_else(|| Permit::force(&with.breaker.connections));
        let _connecting = super::http2::Connecting::new(self);
        let upstream = connect(with, permit).await;
        let upstream = upstream.inspect_err(|_| with.ejected())?.counted();
        let http2 = speaks_http2(&upstream);
        self.http2_negotiated.set(Some(http2));
        match http2 {
            true => {
                let connection = self.begin_http2(with, upstream).await?;
                self.http2.borrow_mut().push(connection);
            }
            false => {
                with.stats.upstream_cx_http1_total().inc();
                self.adopt(upstream, Instant::now());
            }
        }
        Ok(http2)
    }

    /// Refuses a connection that turned out to speak something else than the ones before; the next request finds
    /// out anew.
    pub(crate) fn expect(
        &self,
        with: Acquire<'_>,
        upstream: &Upstream,
        http2: bool,
    ) -> Result<(), UpstreamError> {
        if self.http2_negotiated.get().is_none() || speaks_http2(upstream) == http2 {
            return Ok(());
        }
        self.http2_negotiated.set(None);
        with.stats.upstream_cx_protocol_error().inc();
        Err(UpstreamError::Protocol(
            "the host changed the protocol that it chooses".to_owned(),
        ))
    }
}

fn speaks_http2(upstream: &Upstream) -> bool {
    upstream
        .stream
        .session()
        .is_some_and(|session| session.alpn.as_deref() == Some("h2"))
}
