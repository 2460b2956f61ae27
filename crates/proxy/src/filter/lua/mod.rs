//! `envoy.filters.http.lua`: scripts that look at requests and responses, change them, answer them, ask others.
//!
//! A script is a coroutine for each message. Where it waits (for the body, for an answer) the filter waits with it; once it
//! only looks on (pieces of the body, trailers) the head goes on without it. A script that fails is counted and logged, and
//! its message goes on as it is.

mod buffer;
mod call;
mod handle;
mod headers;
mod key;
mod run;
mod ssl;
mod stream;
mod values;
mod view;

use std::{cell::RefCell, rc::Rc, sync::Arc};

use bytes::Bytes;
use mlua::Error;
use outrigger_http::{Framing, Headers, Refusal, ResponseHead};
use serde_json::Value;

use super::{Answer, Filter, Interests, Stage, Step};
use crate::{
    http::{Exchange, LocalReply},
    lua::{self, Limits, Script},
    plan::{
        filter_config::{Lua, LuaPerRoute, RouteScript},
        http_filter::RouteFilterConfig,
    },
    worker::Worker,
};
use run::{Run, State, Waits, With};
use view::{About, View, Wants};

stats::group! {
    /// `http.<prefix>.lua.<stat_prefix>.`
    struct LuaStats {
        counter errors,
        counter executions,
    }
}

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct LuaFilter {
    name: Arc<str>,
    /// Its place among the filters, by which it finds its runs again.
    index: usize,
    plan: Arc<Lua>,
    limits: Limits,
    /// The states of its scripts, made with the first stream that needs them; those of routes among them.
    states: RefCell<Vec<(Arc<Script>, Rc<State>)>>,
    stats: LuaStats,
}

/// States of a filter at once. Routes that change their script leave old ones behind.
const MOST_STATES: usize = 64;

/// The runs of one stream that wait.
#[derive(Debug, Default)]
pub(crate) struct Runs(Vec<Parked>);

#[derive(Debug)]
struct Parked {
    index: usize,
    is_request: bool,
    /// `None` for a filter that has not begun while bytes of the body went by.
    run: Option<Run>,
}

impl Runs {
    /// Whether one of them waits for what follows a response's head.
    pub(crate) fn wait_for_response(&self) -> bool {
        self.0.iter().any(|parked| !parked.is_request)
    }

    fn take(&mut self, index: usize, is_request: bool) -> Option<Parked> {
        let is = |parked: &Parked| parked.index == index && parked.is_request == is_request;
        let at = self.0.iter().position(is)?;
        Some(self.0.swap_remove(at))
    }

    fn waits(&self, index: usize, is_request: bool) -> Option<Waits> {
        let is = |parked: &&Parked| parked.index == index && parked.is_request == is_request;
        let parked = self.0.iter().find(is)?;
        Some(parked.run.as_ref().map_or(Waits::Nothing, |run| run.waits))
    }
}

impl LuaFilter {
    pub(super) fn new(
        name: Arc<str>,
        index: usize,
        plan: Arc<Lua>,
        prefix: &str,
        worker: &Worker,
    ) -> Self {
        let own = match &*plan.stat_prefix {
            "" => String::new(),
            name => format!("{name}."),
        };
        let scope = format!("http.{prefix}.lua.{own}");
        let runtime = |key: &str| worker.bootstrap.runtime.get(key).and_then(Value::as_u64);
        let default = Limits::default();
        Self {
            name,
            index,
            plan,
            limits: Limits {
                instructions: runtime(INSTRUCTIONS).unwrap_or(default.instructions),
                memory: runtime(MEMORY).map_or(default.memory, |bytes| bytes as usize),
                ..default
            },
            states: RefCell::default(),
            stats: LuaStats::new(worker.stats.scope(&scope)),
        }
    }

    /// The script for a stream, and what its route tells it.
    fn script<'p>(
        &'p self,
        config: Option<&'p RouteFilterConfig>,
    ) -> (Option<&'p Arc<Script>>, Option<&'p LuaPerRoute>) {
        match config {
            Some(RouteFilterConfig::Lua(own)) => {
                let script = match &own.script {
                    RouteScript::Default => self.plan.default.as_ref(),
                    RouteScript::Named(name) => self.plan.named.get(name),
                    RouteScript::Own(script) => Some(script),
                };
                (script, Some(own))
            }
            _ => (self.plan.default.as_ref(), None),
        }
    }

    /// The state of a script.
    fn state(&self, script: &Arc<Script>) -> mlua::Result<Rc<State>> {
        let mut states = self.states.borrow_mut();
        let known = states
            .iter()
            .find(|(known, _)| Arc::ptr_eq(known, script) || **known == **script);
        if let Some((_, state)) = known {
            return Ok(state.clone());
        }
        let state = Rc::new(State::new(script, self.limits)?);
        if states.len() >= MOST_STATES {
            states.remove(0);
        }
        states.push((script.clone(), state.clone()));
        Ok(state)
    }

    /// Runs the script on a head.
    fn begin(
        &self,
        exchange: &mut Exchange<'_>,
        response: Option<&mut ResponseHead>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        let is_request = response.is_none();
        let seen = exchange.filters.lua.take(self.index, is_request).is_some();
        let (Some(script), own) = self.script(config) else {
            return Step::Continue;
        };
        let context = own.and_then(|own| own.context.as_ref());
        let context = context.or(self.plan.context.as_ref()).cloned();
        let begun = self.state(script).and_then(|state| {
            let function = match is_request {
                true => &state.machine.on_request,
                false => &state.machine.on_response,
            };
            let Some(function) = function else {
                return Ok(None);
            };
            self.stats.executions().inc();
            let about = About::new(exchange, &self.name, context, worker.weak());
            let mut view = View::new(is_request, self.plan.clear_route_cache, about);
            view.streamed = seen && exchange.filters.in_hand.is_none();
            Run::new(&state, function, view).map(Some)
        });
        match begun {
            Ok(Some(run)) => self.go(exchange, run, response, With::Start, worker),
            Ok(None) => Step::Continue,
            Err(error) => {
                self.failed(&error);
                Step::Continue
            }
        }
    }

    /// Goes on with a run that waited; without one there is nothing to do.
    fn go_on(
        &self,
        exchange: &mut Exchange<'_>,
        response: Option<&mut ResponseHead>,
        with: With,
        worker: &Worker,
    ) -> Step {
        let parked = exchange.filters.lua.take(self.index, response.is_none());
        match parked.and_then(|parked| parked.run) {
            Some(run) => self.go(exchange, run, response, with, worker),
            None => Step::Continue,
        }
    }

    /// Lets a script run whose head has not gone on, and does what it wants.
    fn go(
        &self,
        exchange: &mut Exchange<'_>,
        mut run: Run,
        mut response: Option<&mut ResponseHead>,
        with: With,
        worker: &Worker,
    ) -> Step {
        let is_request = response.is_none();
        let wants = run.resume(exchange, response.as_deref_mut(), with);
        self.call_all(&mut run, exchange, worker);
        let wants = match wants {
            Ok(Some(wants)) => wants,
            Ok(None) => return Step::Continue,
            Err(error) => {
                self.failed(&error);
                return Step::Continue;
            }
        };
        let limit = exchange.buffer_limit();
        let (waits, step) = match wants {
            Wants::Body => {
                let limit = u32::try_from(limit).unwrap_or(u32::MAX);
                let partial = false;
                (Waits::Body, Step::Body { limit, partial })
            }
            Wants::Chunk => (Waits::Chunk, Step::Continue),
            Wants::Trailers => (Waits::Trailers, Step::Continue),
            Wants::Call(call) => {
                let duplicates = call.duplicates;
                let pending = call.make(worker.weak(), limit as usize);
                (Waits::Call { duplicates }, Step::Ask(pending))
            }
            Wants::Respond {
                status,
                headers,
                body,
            } => {
                let mut reply = LocalReply::new(status, "", "lua_response").body(body);
                reply.headers = headers;
                return Step::Reply(reply);
            }
        };
        if matches!(step, Step::Continue) {
            if let Some(view) = run.view() {
                view.open = false;
            }
            if waits == Waits::Chunk && run.may_set_bytes() {
                uncount(exchange, response);
            }
        }
        run.waits = waits;
        exchange.filters.lua.0.push(Parked {
            index: self.index,
            is_request,
            run: Some(run),
        });
        step
    }

    /// Lets a script run that looks on.
    fn look_on(&self, exchange: &mut Exchange<'_>, is_request: bool, with: With) -> Option<Run> {
        let parked = exchange.filters.lua.take(self.index, is_request)?;
        let mut run = parked.run?;
        match run.resume(exchange, None, with) {
            Ok(wants) => {
                run.waits = match wants {
                    Some(Wants::Chunk) => Waits::Chunk,
                    Some(Wants::Trailers) => Waits::Trailers,
                    _ => Waits::Nothing,
                };
                Some(run)
            }
            Err(error) => {
                self.failed(&error);
                None
            }
        }
    }

    /// A piece of a body goes by.
    fn data(&self, exchange: &mut Exchange<'_>, is_request: bool, data: &mut Bytes) {
        let lua = &mut exchange.filters.lua;
        match lua.waits(self.index, is_request) {
            Some(Waits::Chunk) => {}
            // Another filter has asked for the body before this one saw the head.
            None if is_request && exchange.upstream.attempts == 0 => {
                lua.0.push(Parked {
                    index: self.index,
                    is_request,
                    run: None,
                });
                return;
            }
            _ => return,
        }
        let Some(mut run) = self.look_on(exchange, is_request, With::Chunk(data.clone())) else {
            return;
        };
        if let Some(view) = run.view() {
            *data = view.chunk.data.clone();
            view.chunk.gone = true;
        }
        self.call_now(&mut run, exchange);
        self.park(exchange, is_request, run);
    }

    /// A message has ended; gives what the script adds to its body.
    fn end(
        &self,
        exchange: &mut Exchange<'_>,
        is_request: bool,
        trailers: Option<&mut Headers>,
    ) -> Option<Bytes> {
        let waits = exchange.filters.lua.waits(self.index, is_request)?;
        if !matches!(waits, Waits::Chunk | Waits::Trailers) {
            return None;
        }
        let is =
            |parked: &&mut Parked| parked.index == self.index && parked.is_request == is_request;
        let parked = exchange.filters.lua.0.iter_mut().find(is)?;
        let view = parked.run.as_mut()?.view()?;
        view.ended = true;
        let has_trailers = trailers.is_some();
        if let Some(trailers) = &trailers {
            view.trailers = Some((*trailers).clone());
        }
        let with = match waits {
            Waits::Trailers if has_trailers => With::Trailers,
            _ => With::Nothing,
        };
        let mut run = self.look_on(exchange, is_request, with)?;
        self.call_now(&mut run, exchange);
        let view = run.view()?;
        if let (Some(trailers), Some(changed)) = (trailers, view.trailers.take()) {
            *trailers = changed;
        }
        let added = view.chunk.changed && !view.chunk.data.is_empty();
        added.then(|| view.chunk.data.clone())
    }

    fn park(&self, exchange: &mut Exchange<'_>, is_request: bool, run: Run) {
        if run.waits != Waits::Nothing {
            exchange.filters.lua.0.push(Parked {
                index: self.index,
                is_request,
                run: Some(run),
            });
        }
    }

    /// Makes the calls that nobody waits for.
    fn call_all(&self, run: &mut Run, exchange: &Exchange<'_>, worker: &Worker) {
        let limit = exchange.buffer_limit() as usize;
        for call in run.view().into_iter().flat_map(|view| view.calls.drain(..)) {
            tokio::task::spawn_local(call.make(worker.weak(), limit));
        }
    }

    fn call_now(&self, run: &mut Run, exchange: &Exchange<'_>) {
        let worker = run.view().and_then(|view| view.about.worker.upgrade());
        if let Some(worker) = worker {
            self.call_all(run, exchange, &worker);
        }
    }

    fn failed(&self, error: &Error) {
        self.stats.errors().inc();
        tracing::error!(target: lua::LOG, "script log: {}", lua::message(error));
        if lua::is_memory(error) {
            // What fills the state would make every later run fail.
            self.states.borrow_mut().clear();
        }
    }
}

/// The length of a body that a script may change piece by piece is not known.
fn uncount(exchange: &mut Exchange<'_>, response: Option<&mut ResponseHead>) {
    let (headers, framing) = match response {
        Some(head) => (&mut head.headers, &mut head.framing),
        None => (&mut exchange.request.headers, &mut exchange.request.framing),
    };
    if matches!(framing, Framing::Length(_)) && !framing.is_none() {
        *framing = Framing::Chunked;
        headers.remove("content-length");
    }
}

impl Filter for LuaFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
            .and(Interests::REQUEST_DATA)
            .and(Interests::RESPONSE)
            .and(Interests::RESPONSE_DATA)
            .and(Interests::BODIES)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        self.begin(exchange, None, config, worker)
    }

    fn buffered(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        worker: &Worker,
        _: Bytes,
        _: bool,
    ) -> Step {
        self.go_on(exchange, None, With::Body, worker)
    }

    fn answered(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        worker: &Worker,
        answer: Answer,
    ) -> Step {
        self.go_on(exchange, None, answered(answer), worker)
    }

    fn request_data(&self, exchange: &mut Exchange<'_>, data: &mut Bytes) -> Result<(), Refusal> {
        self.data(exchange, true, data);
        Ok(())
    }

    fn request_end(
        &self,
        exchange: &mut Exchange<'_>,
        trailers: Option<&mut Headers>,
    ) -> Option<Bytes> {
        self.end(exchange, true, trailers)
    }

    fn response_step(
        &self,
        exchange: &mut Exchange<'_>,
        response: &mut ResponseHead,
        config: Option<&RouteFilterConfig>,
        at: Stage,
        worker: &Worker,
    ) -> Step {
        match at {
            Stage::Head => self.begin(exchange, Some(response), config, worker),
            Stage::Buffered(..) => self.go_on(exchange, Some(response), With::Body, worker),
            Stage::Answered(answer) => {
                self.go_on(exchange, Some(response), answered(answer), worker)
            }
            Stage::Resumed => Step::Continue,
        }
    }

    fn response_data(&self, exchange: &mut Exchange<'_>, data: &mut Bytes) {
        self.data(exchange, false, data);
    }

    fn response_end(
        &self,
        exchange: &mut Exchange<'_>,
        trailers: Option<&mut Headers>,
    ) -> Option<Bytes> {
        self.end(exchange, false, trailers)
    }
}

fn answered(answer: Answer) -> With {
    match answer {
        Answer::Call(answer) => With::Call(*answer),
        _ => With::Call(Err(crate::http::SideCallError::NoCluster(String::new()))),
    }
}

/// Runtime keys of the limits.
const INSTRUCTIONS: &str = "outrigger.lua.max_instructions";
const MEMORY: &str = "outrigger.lua.max_memory_bytes";
