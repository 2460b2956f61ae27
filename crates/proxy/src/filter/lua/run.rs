//! One run of a script on one message: a coroutine, and what it waits for.

use std::{cell::RefCell, rc::Rc};

use bytes::Bytes;
use mlua::{Error, Function, IntoLuaMulti, MultiValue, Thread};
use outrigger_http::ResponseHead;

use super::{
    buffer::Buffer,
    call,
    handle::{self, Handle},
    headers::HeaderMap,
    view::{Slot, View, Wants, token},
};
use crate::{
    http::{Exchange, SideCallError, SideResponse},
    lua::{Limits, Machine, Script},
    worker::moment,
};

/// A Lua state whose scripts can be run on streams.
#[derive(Debug)]
pub(super) struct State {
    pub(super) machine: Machine,
    slot: Rc<RefCell<Slot>>,
    /// The script may change pieces of a body.
    sets_bytes: bool,
}

impl State {
    pub(super) fn new(script: &Script, limits: Limits) -> mlua::Result<State> {
        let machine = Machine::new(script, limits)?;
        let slot = Rc::default();
        handle::prepare(&machine.lua, &slot)?;
        Ok(State {
            machine,
            slot,
            sets_bytes: script.may_set_bytes(),
        })
    }
}

/// A script that runs, or waits. Dropped with its stream, wherever it stands.
pub(super) struct Run {
    state: Rc<State>,
    thread: Thread,
    number: u64,
    /// Away while the script runs.
    view: Option<Box<View>>,
    pub(super) waits: Waits,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Run({}, {:?})", self.number, self.waits)
    }
}

/// What a script waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waits {
    Nothing,
    Body,
    Chunk,
    Trailers,
    /// With whether repeated headers are wanted as lists.
    Call {
        duplicates: bool,
    },
}

/// With what a script goes on.
#[derive(Debug)]
pub(super) enum With {
    /// From its beginning.
    Start,
    /// What it waited for is not there, or the body has ended.
    Nothing,
    /// All of the body, which is in hand.
    Body,
    Chunk(Bytes),
    Trailers,
    Call(Result<SideResponse, SideCallError>),
}

impl Run {
    pub(super) fn new(state: &Rc<State>, function: &Function, view: View) -> mlua::Result<Run> {
        let thread = state.machine.lua.create_thread(function.clone())?;
        let number = {
            let mut slot = state.slot.borrow_mut();
            slot.runs += 1;
            slot.runs
        };
        Ok(Run {
            state: state.clone(),
            thread,
            number,
            view: Some(Box::new(view)),
            waits: Waits::Nothing,
        })
    }

    /// What the script sees, while it waits.
    pub(super) fn view(&mut self) -> Option<&mut View> {
        self.view.as_deref_mut()
    }

    /// Whether pieces of the body may come out longer or shorter than they went in.
    pub(super) fn may_set_bytes(&self) -> bool {
        self.state.sets_bytes
    }

    /// Lets the script run to its next wait; `None` where it has ended. The response's head is given as long as it has not
    /// gone on.
    pub(super) fn resume(
        &mut self,
        exchange: &mut Exchange<'_>,
        mut response: Option<&mut ResponseHead>,
        with: With,
    ) -> mlua::Result<Option<Wants>> {
        let view = self.view.take();
        let mut view = view.ok_or_else(|| Error::runtime("the script runs already"))?;
        view.lend(exchange, response.as_deref_mut());
        if let With::Chunk(data) = &with {
            view.streamed = true;
            view.chunk.number += 1;
            view.chunk.data = data.clone();
            view.chunk.gone = false;
        }
        let with = match with {
            With::Body if view.lacks_body() => With::Nothing,
            with => with,
        };
        view.chunk.changed = false;
        let chunk = view.chunk.number;
        {
            let mut slot = self.state.slot.borrow_mut();
            slot.generation += 1;
            slot.run = self.number;
            slot.view = Some(view);
        }
        self.state.machine.refill();
        let ran = self
            .given(with, chunk)
            .and_then(|given| self.thread.resume::<MultiValue>(given));
        moment::passed();
        let view = self.state.slot.borrow_mut().view.take();
        let mut view = view.ok_or_else(|| Error::runtime("the script has lost its stream"))?;
        view.take_back(exchange, response);
        let wants = view.wants.take();
        self.view = Some(view);
        ran?;
        if !self.thread.is_resumable() {
            return Ok(None);
        }
        match wants {
            None => Err(Error::runtime("script performed an unexpected yield")),
            wants => Ok(wants),
        }
    }

    /// What the script gets from where it stands.
    fn given(&self, with: With, chunk: u64) -> mlua::Result<MultiValue> {
        let lua = &self.state.machine.lua;
        match with {
            With::Start => Handle(self.number).into_lua_multi(lua),
            With::Nothing => Ok(MultiValue::new()),
            With::Body => Buffer::Whole(token(lua)).into_lua_multi(lua),
            With::Chunk(_) => Buffer::Chunk(self.number, chunk).into_lua_multi(lua),
            With::Trailers => {
                let map = HeaderMap {
                    token: token(lua),
                    trailers: true,
                };
                map.into_lua_multi(lua)
            }
            With::Call(response) => {
                let duplicates = matches!(self.waits, Waits::Call { duplicates: true });
                call::answer(lua, response, duplicates)?.into_lua_multi(lua)
            }
        }
    }
}
