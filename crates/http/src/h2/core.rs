//! The state of one connection, without its bytes: what both sides have said and what follows.
//!
//! `receive` takes frames in, `send` puts frames out, and here is how a connection lives and ends.
//! Whoever drives the connection ([`super::connection`]) reads and writes; the halves of streams
//! ([`super::stream`]) look in from their tasks. All of them live on one thread.

use std::{
    io,
    rc::Rc,
    task::{Context, Waker},
};

use super::{
    Reason, Settings,
    fate::Fate,
    fields_in::Rules,
    frame::{self, MAX},
    guard::{Facts, Guard},
    hpack::{DEFAULT_TABLE, Decoder, Encoder},
    linger::Lingering,
    outbox::Outbox,
    store::{How, Store, keep},
};

/// Which side we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Server,
    Client,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) role: Role,
    pub(super) settings: Settings,
    pub(super) facts: Rc<Facts>,
    pub(super) guard: Guard,
    pub(super) decoder: Decoder,
    pub(super) encoder: Encoder,
    pub(super) store: Store,
    pub(super) out: Outbox,
    pub(super) peer: Peer,

    /// Bytes that we may send on all streams together.
    pub(super) send_window: i64,
    /// Streams that have something to send.
    pub(super) listed: std::collections::VecDeque<u32>,

    /// Bytes that may still come on all streams together.
    pub(super) receive_window: i64,
    /// Bytes that were read and not yet given back.
    pub(super) released: u32,

    /// SETTINGS of the peer have come.
    pub(super) begun: bool,
    /// A header block whose end has not come.
    pub(super) block: Option<Block>,
    /// Streams of ours that are complete but for what nobody reads.
    pub(super) lingering: Lingering,
    /// Storage for cookies that are put together.
    pub(super) cookies: Vec<u8>,
    /// The last stream that the peer opened.
    pub(super) last_in: u32,
    /// The next stream that we open.
    pub(super) next_out: u32,

    /// The last stream that the peer takes, where it has said GOAWAY.
    pub(super) left: Option<u32>,
    pub(super) leaving: Leaving,
    pub(super) ending: Option<Result<(), Fate>>,

    /// The task that drives the connection, and whether it knows that there is something to do.
    driver: Option<Waker>,
    woken: bool,
    /// Tasks that wait to open a stream.
    pub(super) openers: Vec<Waker>,
    /// Handles that could open streams.
    pub(super) handles: usize,
    /// A PING of ours was answered.
    pub(super) answered: bool,
}

/// What the peer has said about itself.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) concurrent_streams: u32,
    pub(super) stream_window: u32,
    pub(super) extended_connect: bool,
}

/// A header block in pieces.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) stream: u32,
    pub(super) ended: bool,
    /// The stream is said to depend on itself.
    pub(super) circular: bool,
    pub(super) bytes: Vec<u8>,
    pub(super) pieces: usize,
}

/// Our way out (RFC 9113, 6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaving {
    No,
    /// GOAWAY was said without a last stream; what is on its way is still taken.
    Announced,
    /// Streams above this one are not taken any more.
    Last(u32),
}

/// Windows that both sides begin with.
const DEFAULT_WINDOW: u32 = 65_535;

/// Streams that we open before the peer has said how many it takes.
const STREAMS_AT_FIRST: u32 = 100;

/// The PING behind the first GOAWAY: when its answer comes, the peer has seen both.
pub(super) const LEAVING_PING: [u8; 8] = *b"leaving!";

impl Core {
    /// A connection that has put its preface and settings into the outbox.
    pub(super) fn new(role: Role, settings: &Settings) -> Core {
        let facts = Rc::new(Facts::default());
        let mut core = Core {
            role,
            guard: Guard::new(&facts, settings.floods, role == Role::Server),
            facts,
            decoder: Decoder::new(),
            encoder: Encoder::new(settings.huffman),
            store: Store::default(),
            out: Outbox::default(),
            peer: Peer {
                concurrent_streams: match role {
                    Role::Server => 0,
                    Role::Client => STREAMS_AT_FIRST,
                },
                stream_window: DEFAULT_WINDOW,
                extended_connect: false,
            },
            send_window: DEFAULT_WINDOW.into(),
            listed: Default::default(),
            receive_window: settings.connection_window.max(DEFAULT_WINDOW).into(),
            released: 0,
            begun: false,
            block: None,
            lingering: Lingering::default(),
            cookies: Vec::new(),
            last_in: 0,
            next_out: 1,
            left: None,
            leaving: Leaving::No,
            ending: None,
            driver: None,
            woken: false,
            openers: Vec::new(),
            handles: 0,
            answered: false,
            settings: settings.clone(),
        };
        core.say_settings();
        core
    }

    fn say_settings(&mut self) {
        let settings = &self.settings;
        let mut said = Vec::with_capacity(6);
        if settings.header_table as usize != DEFAULT_TABLE {
            said.push((frame::HEADER_TABLE_SIZE, settings.header_table));
        }
        if settings.header_table as usize > DEFAULT_TABLE {
            self.decoder.allow(settings.header_table as usize);
        }
        match self.role {
            Role::Client => said.push((frame::ENABLE_PUSH, 0)),
            Role::Server => {
                said.push((frame::MAX_CONCURRENT_STREAMS, settings.concurrent_streams));
                if settings.extended_connect {
                    said.push((frame::ENABLE_CONNECT_PROTOCOL, 1));
                }
            }
        }
        said.push((frame::INITIAL_WINDOW_SIZE, settings.stream_window));
        said.push((frame::MAX_HEADER_LIST_SIZE, settings.header_list));
        said.extend(settings.custom.iter().flat_map(|custom| custom.iter()));
        let role = self.role;
        let out = self.out.buffer();
        if role == Role::Client {
            out.extend_from_slice(super::PREFACE);
        }
        frame::put_settings(out, &said);
        let more = self
            .settings
            .connection_window
            .saturating_sub(DEFAULT_WINDOW);
        if more > 0 {
            frame::put_window_update(out, 0, more);
        }
    }

    /// What we take of heads and trailers.
    pub(super) fn rules(&self) -> Rules {
        Rules {
            list: self.settings.header_list as usize,
            field: self.settings.header_field as usize,
            obs_text: self.settings.obs_text,
            count: self.settings.headers,
            extended_connect: self.settings.extended_connect,
        }
    }

    /// Remembers who drives the connection, which is about to look at everything.
    pub(super) fn drive(&mut self, cx: &Context<'_>) {
        keep(&mut self.driver, cx);
        self.woken = true;
    }

    /// Whoever drives the connection has seen everything.
    pub(super) fn rest(&mut self) {
        self.woken = false;
    }

    /// There is something to do for who drives the connection.
    pub(super) fn wake(&mut self) {
        if !std::mem::replace(&mut self.woken, true)
            && let Some(driver) = &self.driver
        {
            driver.wake_by_ref();
        }
    }

    /// Whether streams may no longer be opened by us.
    pub(super) fn is_over(&self) -> bool {
        self.ending.is_some() || self.left.is_some() || self.next_out > MAX
    }

    pub(super) fn wake_openers(&mut self) {
        for opener in self.openers.drain(..) {
            opener.wake();
        }
    }

    /// Says GOAWAY in two steps: streams that run may end, new ones are refused, then the
    /// connection ends.
    pub(super) fn drain(&mut self) {
        if self.leaving != Leaving::No || self.ending.is_some() {
            return;
        }
        self.leaving = Leaving::Announced;
        self.facts.send_goaway();
        let out = self.out.buffer();
        frame::put_goaway(out, MAX, Reason::NO_ERROR);
        frame::put_ping(out, 0, LEAVING_PING);
        self.wake();
    }

    /// The peer has seen that we leave.
    pub(super) fn leave(&mut self) {
        if self.leaving == Leaving::Announced {
            self.leaving = Leaving::Last(self.last_in);
            self.facts.send_goaway();
            frame::put_goaway(self.out.buffer(), self.last_in, Reason::NO_ERROR);
            self.wake();
        }
    }

    /// Whether nothing is left to wait for.
    pub(super) fn is_done(&self) -> bool {
        if self.store.open_count() > 0 {
            return false;
        }
        let abandoned = self.role == Role::Client && self.handles == 0;
        abandoned || self.left.is_some() || matches!(self.leaving, Leaving::Last(_))
    }

    /// Ends a connection on which nothing is left to wait for.
    pub(super) fn finish_well(&mut self) {
        match self.leaving {
            // The peer was told already.
            Leaving::Last(_) => self.ending = Some(Ok(())),
            _ => self.end(Reason::NO_ERROR, Ok(())),
        }
    }

    /// Says GOAWAY for a reason; all streams end, and the connection with them as soon as the peer
    /// was told.
    pub(super) fn end(&mut self, reason: Reason, result: Result<(), Fate>) {
        if self.ending.is_some() {
            return;
        }
        self.facts.send_goaway();
        let last = match self.leaving {
            Leaving::Last(last) => last,
            _ => self.last_in,
        };
        frame::put_goaway(self.out.buffer(), last, reason);
        let fate = match result {
            Err(fate) => fate,
            Ok(()) => Fate::Reset(reason),
        };
        self.ending = Some(result);
        self.fail(fate);
        self.wake();
    }

    /// The connection is no more.
    pub(super) fn lose(&mut self, fate: Fate) {
        if self.ending.is_none() {
            self.ending = Some(Err(fate));
        }
        self.fail(fate);
    }

    /// The peer has said all it will say.
    pub(super) fn end_of_input(&mut self) {
        let result = match self.store.open_count() {
            0 => Ok(()),
            _ => Err(Fate::Closed),
        };
        self.ending.get_or_insert(result);
        self.fail(Fate::Closed);
    }

    /// Ends all streams.
    fn fail(&mut self, fate: Fate) {
        for place in self.store.places() {
            self.break_off(place, fate, How::Us);
        }
        self.listed.clear();
        self.wake_openers();
    }

    /// Ends a stream before its end, without a word to the peer.
    pub(super) fn break_off(&mut self, place: u32, fate: Fate, how: How) {
        let stream = self.store.get(place);
        stream.fate.get_or_insert(fate);
        stream.drop_queue();
        stream.listed = false;
        stream.wake_reader();
        stream.wake_writer();
        self.listed.retain(|&listed| listed != place);
        self.close(place, how);
    }

    /// The stream is over on the wire.
    pub(super) fn close(&mut self, place: u32, how: How) {
        self.store.close(place, how);
        self.wake_openers();
        if self.is_done() {
            self.wake();
        }
    }
}

impl From<io::Error> for Fate {
    fn from(error: io::Error) -> Fate {
        Fate::Io(error.kind())
    }
}
