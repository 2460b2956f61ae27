//! Responses that wait for a filter: one that wants all of the body, or asks somebody else, before the head goes on.

use std::{
    future::poll_fn,
    pin::pin,
    task::{Context as TaskContext, Poll},
};

use bytes::{Bytes, BytesMut};
use outrigger_http::{Error, Frame, Headers, Method, ResponseHead};

use super::{
    Context, Exchange, LocalReply,
    failure::{self, Gone},
    forward::{AttemptError, Forward},
    pump::PumpError,
    respond,
    timers::{Expired, Timer},
    upstream::Upstream,
};
use crate::filter::{Answer, InHand, Pending, Stage, Step};

/// A response's body that filters have read.
#[derive(Debug)]
pub(super) struct Held {
    /// What is left to be sent.
    pub(super) data: Option<Bytes>,
    pub(super) trailers: Option<Headers>,
    /// The filters from this one on have seen it.
    pub(super) seen_by: usize,
}

impl Held {
    /// What comes next, as an upstream would give it.
    pub(super) fn frame(&mut self) -> Option<Frame> {
        let data = self.data.take().map(Frame::Data);
        data.or_else(|| self.trailers.take().map(Frame::Trailers))
    }
}

/// Why no response came of waiting.
#[derive(Debug)]
pub(super) enum Unheld {
    /// The body is larger than what may be held back.
    TooLarge,
    Upstream(Error),
    Downstream(Gone),
    Expired(Expired),
}

/// Runs the filters on a reply of our own; gives its body.
pub(super) async fn filter_local(
    cx: &Context<'_>,
    exchange: &mut Exchange<'_>,
    head: &mut ResponseHead,
    mut body: Bytes,
) -> Bytes {
    let filters = cx.filters(exchange);
    for index in (0..filters.len()).rev() {
        let mut at = Stage::Head;
        loop {
            if filters.takes_bodies(index) {
                exchange.filters.in_hand = Some(Box::new(InHand {
                    body: body.clone(),
                    ..InHand::default()
                }));
            }
            let step = filters.response_step(index, exchange, head, at, cx.worker);
            if let Some(hand) = exchange.filters.in_hand.take()
                && hand.changed
            {
                body = hand.body;
            }
            at = match step {
                Step::Ask(answer) => Stage::Answered(answer.await),
                _ => break,
            };
        }
    }
    match exchange.request.method {
        Method::Head => Bytes::new(),
        _ => body,
    }
}

impl Forward<'_, '_, '_, '_> {
    /// Runs the filters on a response, with all that they wait for.
    pub(super) async fn filter_response(
        &mut self,
        upstream: &mut Upstream,
        head: &mut ResponseHead,
        timer: &mut Timer,
    ) -> Result<(), Unheld> {
        let filters = self.cx.filters(self.exchange);
        for index in (0..filters.len()).rev() {
            let mut at = Stage::Head;
            loop {
                let step = self.ask_filter(index, head, at);
                at = match step {
                    Step::Body { limit, .. } => {
                        if self.held.is_none() {
                            let read = self.hold(upstream, limit as usize, timer);
                            self.held = Some(read.await?);
                        }
                        Stage::Buffered(Bytes::new(), true)
                    }
                    Step::Ask(answer) => Stage::Answered(self.wait(upstream, answer, timer).await?),
                    _ => break,
                };
            }
        }
        if self.exchange.request.method == Method::Head
            && let Some(held) = &mut self.held
        {
            held.data = None;
        }
        Ok(())
    }

    /// Ends a response that came to nothing while it waited.
    pub(super) async fn unheld(&mut self, upstream: Upstream, why: Unheld) {
        upstream.cancel();
        let stats = &self.cx.live.stats;
        let failed = match why {
            Unheld::TooLarge => {
                stats.rs_too_large().inc();
                let text = "Internal Server Error";
                Some(LocalReply::new(500, text, "response_payload_too_large"))
            }
            Unheld::Upstream(error) => {
                let error = AttemptError::Broken {
                    error,
                    stale: false,
                };
                failure::reply(error, self.exchange, self.kept.complete, self.cx.live)
            }
            Unheld::Downstream(gone) => {
                let gone = AttemptError::Downstream(gone);
                failure::reply(gone, self.exchange, self.kept.complete, self.cx.live)
            }
            Unheld::Expired(expired) => {
                let expired = AttemptError::Expired(expired);
                failure::reply(expired, self.exchange, self.kept.complete, self.cx.live)
            }
        };
        match failed {
            // Filters have begun with another response.
            Some(reply) => {
                let reply = reply.render(self.exchange, &self.cx.live.plan.local_reply);
                respond::send_reply(self.cx, self.exchange, self.reader, self.writer, reply).await;
            }
            None => respond::abort(self.writer),
        }
    }

    /// Runs one filter on the response; one that may change bodies is lent what was read.
    fn ask_filter(&mut self, index: usize, head: &mut ResponseHead, at: Stage) -> Step {
        let filters = self.cx.filters(self.exchange);
        let takes = filters.takes_bodies(index);
        if let Some(held) = self.held.as_mut().filter(|_| takes) {
            let mut body = held.data.take().unwrap_or_default();
            // Those before it on the way down see what the upstream sent.
            if held.seen_by > index + 1 {
                let before = index + 1..held.seen_by;
                filters.response_data_to(before, self.exchange, &mut body);
                held.seen_by = index + 1;
            }
            self.exchange.filters.in_hand = Some(Box::new(InHand {
                body,
                changed: false,
                trailers: held.trailers.take(),
            }));
        }
        let step = filters.response_step(index, self.exchange, head, at, self.cx.worker);
        if let Some(hand) = self.exchange.filters.in_hand.take() {
            self.held = Some(Held {
                data: Some(hand.body).filter(|body| !body.is_empty()),
                trailers: hand.trailers,
                seen_by: index,
            });
        }
        step
    }

    /// Reads all of the response's body.
    async fn hold(
        &mut self,
        upstream: &mut Upstream,
        limit: usize,
        timer: &mut Timer,
    ) -> Result<Held, Unheld> {
        let mut data = BytesMut::new();
        let mut trailers = None;
        poll_fn(|cx| {
            loop {
                match upstream.poll_frame(cx) {
                    Poll::Ready(Some(Ok(Frame::Data(piece)))) => {
                        self.deadlines.touch();
                        self.exchange.progress.body_received(true);
                        if data.len() + piece.len() > limit {
                            return Poll::Ready(Err(Unheld::TooLarge));
                        }
                        data.extend_from_slice(&piece);
                    }
                    Poll::Ready(Some(Ok(Frame::Trailers(last)))) => trailers = Some(last),
                    Poll::Ready(Some(Err(error))) => {
                        return Poll::Ready(Err(Unheld::Upstream(error)));
                    }
                    Poll::Ready(None) => return Poll::Ready(Ok(())),
                    Poll::Pending => break,
                }
            }
            self.poll_meanwhile(cx, upstream, timer).map(Err)
        })
        .await?;
        Ok(Held {
            data: Some(data.freeze()).filter(|data| !data.is_empty()),
            trailers,
            seen_by: self.cx.filters(self.exchange).len(),
        })
    }

    /// Waits for what a filter has asked for.
    async fn wait(
        &mut self,
        upstream: &mut Upstream,
        answer: Pending,
        timer: &mut Timer,
    ) -> Result<Answer, Unheld> {
        let mut answer = pin!(answer);
        poll_fn(|cx| {
            if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                return Poll::Ready(Ok(answer));
            }
            self.poll_meanwhile(cx, upstream, timer).map(Err)
        })
        .await
    }

    /// What goes on while a response waits: the rest of the request, the client, the deadlines.
    fn poll_meanwhile(
        &mut self,
        cx: &mut TaskContext<'_>,
        upstream: &mut Upstream,
        timer: &mut Timer,
    ) -> Poll<Unheld> {
        match self.poll_pump(cx, upstream) {
            Poll::Ready(Err(PumpError::Downstream(error))) => {
                return Poll::Ready(Unheld::Downstream(Gone::from(error)));
            }
            Poll::Ready(Err(PumpError::Upstream(_))) => self.pump.dead = true,
            _ => {}
        }
        if let Poll::Ready(gone) = failure::poll_gone(cx, self.reader, self.writer) {
            return Poll::Ready(Unheld::Downstream(gone));
        }
        self.poll_deadlines(cx, timer).map(Unheld::Expired)
    }
}
