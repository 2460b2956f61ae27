//! Attempts that took too long and go on beside their successors (`hedge_on_per_try_timeout`): the first good response wins.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context as TaskContext, Poll},
};

use outrigger_http::ResponseHead;

use super::{
    failure,
    forward::{AttemptError, Forward},
    pump::Pump,
    timers::Timer,
    upstream::Upstream,
};
use crate::{cluster::Host, router::retry::Answer};

/// An attempt whose whole request is up and whose response is still waited for.
#[derive(Debug)]
pub(super) struct Hedged {
    pub(super) upstream: Upstream,
    pub(super) host: Arc<Host>,
}

impl Forward<'_, '_, '_, '_> {
    /// Whether an attempt that took too long goes on beside the next one.
    pub(super) fn hedges(&self) -> bool {
        self.hedge && self.pump.is_ended() && self.retries.is_possible()
    }

    /// The response of an older attempt, unless it is one that would be repeated.
    pub(super) fn poll_hedged(&mut self, cx: &mut TaskContext<'_>) -> Poll<(Hedged, ResponseHead)> {
        let mut index = 0;
        while let Some(older) = self.hedged.get_mut(index) {
            let _ = older.upstream.poll_flush(cx);
            match older.upstream.poll_head(cx, false) {
                Poll::Pending => index += 1,
                Poll::Ready(Ok(head)) if head.is_informational() => {}
                Poll::Ready(Ok(head)) if self.retries.response(&head) == Answer::No => {
                    return Poll::Ready((self.hedged.swap_remove(index), head));
                }
                Poll::Ready(_) => self.hedged.swap_remove(index).upstream.cancel(),
            }
        }
        Poll::Pending
    }

    /// When the last attempt has failed: waits for the older ones. `None` when they fail, too.
    pub(super) async fn last_hope(
        &mut self,
        timer: &mut Timer,
    ) -> Option<Result<(Hedged, ResponseHead), AttemptError>> {
        self.deadlines.per_try = None;
        self.deadlines.per_try_idle = None;
        poll_fn(|cx| {
            if let Poll::Ready(response) = self.poll_hedged(cx) {
                return Poll::Ready(Some(Ok(response)));
            }
            if self.hedged.is_empty() {
                return Poll::Ready(None);
            }
            if let Poll::Ready(gone) = failure::poll_gone(cx, self.reader, self.writer) {
                return Poll::Ready(Some(Err(AttemptError::Downstream(gone))));
            }
            self.poll_deadlines(cx, timer)
                .map(|expired| Some(Err(AttemptError::Expired(expired))))
        })
        .await
    }

    /// An older attempt has won: it is the one that is told of.
    pub(super) fn take_over(&mut self, older: Hedged) -> Upstream {
        let mut older = older;
        self.connected(&mut older.upstream);
        self.exchange.upstream.host = Some(older.host);
        // All of the request went up on it.
        self.pump = Pump::finished();
        older.upstream
    }
}
