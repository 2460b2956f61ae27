//! What a script sees of its stream, while it runs.
//!
//! Objects in Lua hold numbers alone. What the numbers stand for is lent to the state for the time of one resumption (the
//! heads, the metadata and the filter state move into the [`View`], and back), so that an object that a script keeps for
//! later finds nothing, and can say so.

use std::{cell::RefCell, collections::BTreeMap, mem, net::SocketAddr, rc::Rc, sync::Arc};

use bytes::Bytes;
use mlua::{Error, Lua};
use outrigger_http::{Framing, Headers, Method, RequestHead, ResponseHead, Version};
use serde_json::Value;
use tls::session::Session;

use super::call::Call;
use crate::{
    filter::InHand,
    filter_state::FilterState,
    http::{Exchange, RouteRef},
    worker::WorkerRef,
};

/// The head that a run is about.
#[derive(Debug)]
pub(super) enum Head {
    Request(RequestHead),
    Response(ResponseHead),
    /// The script does not run.
    Away,
}

/// What a script has asked for, and waits for.
#[derive(Debug)]
pub(super) enum Wants {
    /// All of the body.
    Body,
    /// Its next piece.
    Chunk,
    /// What follows it.
    Trailers,
    /// The answer of a cluster.
    Call(Box<Call>),
    /// That the client gets this answer, and the script ends.
    Respond {
        status: u16,
        headers: Headers,
        body: Bytes,
    },
}

/// A piece of a body on its way.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// Which one it is, from 1.
    pub(super) number: u64,
    pub(super) data: Bytes,
    /// It has gone on; what a script makes of an empty one at the end of the body follows it.
    pub(super) gone: bool,
    pub(super) changed: bool,
}

/// One run's view of its stream.
#[derive(Debug)]
pub(super) struct View {
    pub(super) head: Head,
    /// The head has not gone on yet.
    pub(super) open: bool,
    pub(super) is_request: bool,
    /// Changes of request headers choose the route anew.
    pub(super) clears_route: bool,
    /// The route has to be chosen anew.
    pub(super) clear_route: bool,
    pub(super) override_host: Option<(Box<str>, bool)>,
    pub(super) wants: Option<Wants>,
    /// Nothing of the body is to come any more.
    pub(super) ended: bool,
    /// Some of the body has gone by.
    pub(super) streamed: bool,
    /// The script wants a body even where there is none.
    pub(super) wrap: bool,
    /// All of the body, where it is in hand.
    pub(super) body: Option<Bytes>,
    pub(super) body_changed: bool,
    pub(super) chunk: Chunk,
    pub(super) trailers: Option<Headers>,
    /// Calls that nobody waits for.
    pub(super) calls: Vec<Call>,
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) state: FilterState,
    pub(super) about: About,
}

/// What does not change during a run.
#[derive(Debug)]
pub(super) struct About {
    /// The filter's name in the configuration.
    pub(super) filter: Arc<str>,
    pub(super) context: Option<Arc<Value>>,
    pub(super) route: RouteRef,
    pub(super) virtual_cluster: Option<String>,
    pub(super) version: Version,
    pub(super) tls: Option<Arc<Session>>,
    pub(super) local: Option<SocketAddr>,
    pub(super) remote: Option<SocketAddr>,
    pub(super) direct_remote: Option<SocketAddr>,
    pub(super) server_name: Option<Arc<str>>,
    pub(super) connection_metadata: BTreeMap<String, Value>,
    pub(super) worker: WorkerRef,
}

impl About {
    pub(super) fn new(
        exchange: &Exchange<'_>,
        filter: &Arc<str>,
        context: Option<Arc<Value>>,
        worker: WorkerRef,
    ) -> About {
        let connection = exchange.connection;
        let client = exchange.client.zip(connection.remote);
        About {
            filter: filter.clone(),
            context,
            route: exchange.route.clone(),
            virtual_cluster: exchange.route.get().and_then(|(host, _)| {
                let name = host.virtual_cluster(exchange)?;
                Some(name.to_owned())
            }),
            version: exchange.request.version,
            tls: connection.tls.clone(),
            local: connection.local,
            // The client by the rules about x-forwarded-for; its port is known where it is the peer.
            remote: client.map(|(ip, peer)| match ip == peer.ip() {
                true => peer,
                false => (ip, 0).into(),
            }),
            direct_remote: connection.direct_remote,
            server_name: connection.requested_server_name.clone(),
            connection_metadata: crate::http::metadata_of(connection),
            worker,
        }
    }
}

impl View {
    pub(super) fn new(is_request: bool, clears_route: bool, about: About) -> View {
        View {
            head: Head::Away,
            open: true,
            is_request,
            clears_route,
            clear_route: false,
            override_host: None,
            wants: None,
            ended: false,
            streamed: false,
            wrap: false,
            body: None,
            body_changed: false,
            chunk: Chunk::default(),
            trailers: None,
            calls: Vec::new(),
            metadata: BTreeMap::new(),
            state: FilterState::default(),
            about,
        }
    }

    /// Takes what the script may see and change.
    pub(super) fn lend(
        &mut self,
        exchange: &mut Exchange<'_>,
        response: Option<&mut ResponseHead>,
    ) {
        self.head = match response {
            Some(response) => Head::Response(mem::replace(response, ResponseHead::new(0))),
            None if self.is_request => {
                let nothing = RequestHead::new(Version::Http11, Method::Get, "", "");
                Head::Request(mem::replace(&mut exchange.request, nothing))
            }
            None => match exchange.response.take() {
                Some(response) => Head::Response(response),
                None => Head::Away,
            },
        };
        self.metadata = mem::take(&mut exchange.dynamic_metadata);
        self.state = mem::take(&mut exchange.filter_state);
        if let Some(hand) = &mut exchange.filters.in_hand {
            self.ended = true;
            self.body = Some(mem::take(&mut hand.body));
            self.trailers = hand.trailers.take();
        }
    }

    /// Gives it back.
    pub(super) fn take_back(
        &mut self,
        exchange: &mut Exchange<'_>,
        response: Option<&mut ResponseHead>,
    ) {
        self.give_body(exchange);
        match (mem::replace(&mut self.head, Head::Away), response) {
            (Head::Request(request), _) => exchange.request = request,
            (Head::Response(head), Some(response)) => *response = head,
            (Head::Response(head), None) => exchange.response = Some(head),
            (Head::Away, _) => {}
        }
        exchange.dynamic_metadata = mem::take(&mut self.metadata);
        exchange.filter_state = mem::take(&mut self.state);
        exchange.clear_route |= mem::take(&mut self.clear_route);
        if let Some(host) = self.override_host.take() {
            exchange.override_host = Some(host);
        }
    }

    fn give_body(&mut self, exchange: &mut Exchange<'_>) {
        let changed = mem::take(&mut self.body_changed);
        if changed && let Some(body) = &self.body {
            let length = body.len() as u64;
            let framing = match self.trailers {
                // In HTTP/1 trailers need chunks.
                Some(_) => Framing::Chunked,
                None => Framing::Length(length),
            };
            let (headers, own) = match &mut self.head {
                Head::Request(head) => (&mut head.headers, &mut head.framing),
                Head::Response(head) => (&mut head.headers, &mut head.framing),
                Head::Away => return,
            };
            *own = framing;
            headers.set("content-length", itoa::Buffer::new().format(length));
            headers.remove("transfer-encoding");
        }
        if exchange.filters.in_hand.is_none() && !changed {
            return;
        }
        let hand = exchange.filters.in_hand.get_or_insert_with(Box::default);
        let InHand {
            body,
            changed: told,
            trailers,
        } = &mut **hand;
        *body = self.body.clone().unwrap_or_default();
        *told |= changed;
        *trailers = self.trailers.take();
    }

    /// Whether there is no body for a script that waited for it.
    pub(super) fn lacks_body(&self) -> bool {
        !self.wrap && self.body.as_ref().is_none_or(Bytes::is_empty)
    }

    /// Whether the message is known to have no body, or what is left of it is in hand.
    pub(super) fn is_over(&self) -> bool {
        self.ended
            || match &self.head {
                Head::Request(head) => head.framing.is_none() && !self.streamed,
                Head::Response(head) => head.framing.is_none() && !self.streamed,
                Head::Away => false,
            }
    }

    /// Whether a message like this can have a body.
    pub(super) fn may_have_body(&self) -> bool {
        !matches!(&self.head, Head::Response(head) if matches!(head.status, 101 | 204 | 304))
    }

    /// Whether the length of the body was told in a head that has gone on.
    pub(super) fn is_counted(&self) -> bool {
        match &self.head {
            Head::Request(head) => matches!(head.framing, Framing::Length(_)),
            Head::Response(head) => matches!(head.framing, Framing::Length(_)),
            Head::Away => false,
        }
    }

    /// Whether bytes of this stream are no message any more.
    pub(super) fn is_tunnel(&self) -> bool {
        match &self.head {
            Head::Request(head) => head.upgrade || head.method == Method::Connect,
            Head::Response(head) => head.framing == Framing::Tunnel,
            Head::Away => false,
        }
    }
}

/// Where a view is while its script runs: in the state's own data.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) view: Option<Box<View>>,
    /// Which run it is.
    pub(super) run: u64,
    /// How many there have been.
    pub(super) runs: u64,
    /// Changes with each resumption of any run.
    pub(super) generation: u64,
}

/// What an object in Lua holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Token {
    /// A run: the handle, which lives as long as its script.
    Run(u64),
    /// A resumption: everything that the handle gives.
    Generation(u64),
}

/// The token for an object that is made now.
pub(super) fn token(lua: &Lua) -> Token {
    let slot = lua.app_data_ref::<Rc<RefCell<Slot>>>();
    let generation = slot.and_then(|slot| Some(slot.try_borrow().ok()?.generation));
    Token::Generation(generation.unwrap_or_default())
}

/// Looks at the stream that an object belongs to.
///
/// # Errors
/// The object is of another run, or of before a wait.
pub(super) fn with<R>(
    lua: &Lua,
    token: Token,
    look: impl FnOnce(&mut View) -> mlua::Result<R>,
) -> mlua::Result<R> {
    let gone = || Error::runtime("object used outside of proper scope");
    let slot = lua.app_data_ref::<Rc<RefCell<Slot>>>().ok_or_else(gone)?;
    let mut slot = slot.try_borrow_mut().map_err(|_| gone())?;
    let fits = match token {
        Token::Run(run) => run == slot.run,
        Token::Generation(generation) => generation == slot.generation,
    };
    match &mut slot.view {
        Some(view) if fits => look(view),
        _ => Err(gone()),
    }
}
