//! The handle: what `envoy_on_request` and `envoy_on_response` get.
//!
//! A method that may have to wait is a function in Lua around one of ours: ours notes in the view what is waited for, and
//! the function yields. Whoever runs the coroutine finds the note.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use mlua::{
    AnyUserData, Error, Function, Lua, LuaString, MultiValue, Table, UserData, UserDataFields,
    UserDataMethods, Value as LuaValue,
};

use super::{
    buffer::Buffer,
    call::{self, Call},
    headers::HeaderMap,
    key::{self, PublicKey},
    stream::{Connection, ConnectionStreamInfo, StreamInfo},
    values::{RouteMetadata, to_lua},
    view::{Slot, Token, View, Wants, token, with},
};
use crate::lua::LOG;

/// The handle of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handle(pub(super) u64);

/// The methods that wait, as functions of Lua.
#[derive(Debug)]
struct Waiting(Table);

/// Makes a state ready for handles.
pub(super) fn prepare(lua: &Lua, slot: &Rc<RefCell<Slot>>) -> mlua::Result<()> {
    lua.set_app_data(slot.clone());
    let begin = lua.create_table()?;
    begin.raw_set("body", lua.create_function(begin_body)?)?;
    begin.raw_set("chunk", lua.create_function(begin_chunk)?)?;
    begin.raw_set("chunks", lua.create_function(begin_chunks)?)?;
    begin.raw_set("trailers", lua.create_function(begin_trailers)?)?;
    begin.raw_set("call", lua.create_function(begin_call)?)?;
    begin.raw_set("respond", lua.create_function(begin_respond)?)?;
    let waiting = lua.load(WAITING).set_name("=prelude").call(begin)?;
    lua.set_app_data(Waiting(waiting));
    Ok(())
}

/// Ours tell whether there is nothing to wait for, then what there is.
const WAITING: &str = r#"
local begin = ...
local yield = coroutine.yield
local function go(ready, ...)
  if ready then return ... end
  return yield()
end
return {
  body = function(self, wrap) return go(begin.body(self, wrap)) end,
  bodyChunks = function(self)
    begin.chunks(self)
    return function() return go(begin.chunk(self)) end
  end,
  trailers = function(self) return go(begin.trailers(self)) end,
  httpCall = function(self, ...) return go(begin.call(self, ...)) end,
  respond = function(self, ...) return go(begin.respond(self, ...)) end,
}
"#;

impl UserData for Handle {
    fn add_fields<F: UserDataFields<Self>>(fields: &mut F) {
        for name in ["body", "bodyChunks", "trailers", "httpCall", "respond"] {
            fields.add_field_function_get(name, move |lua, _| {
                let waiting = lua.app_data_ref::<Waiting>();
                let methods = waiting.ok_or_else(|| Error::runtime("no such method"))?;
                methods.0.raw_get::<Function>(name)
            });
        }
    }

    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("headers", |lua, this, ()| {
            this.object(lua, |token| HeaderMap {
                token,
                trailers: false,
            })
        });
        methods.add_method("metadata", |lua, this, ()| this.object(lua, RouteMetadata));
        methods.add_method("streamInfo", |lua, this, ()| this.object(lua, StreamInfo));
        methods.add_method("connection", |lua, this, ()| this.object(lua, Connection));
        methods.add_method("connectionStreamInfo", |lua, this, ()| {
            this.object(lua, ConnectionStreamInfo)
        });
        methods.add_method("filterContext", |lua, this, ()| {
            let context = this.look(lua, |view| Ok(view.about.context.clone()))?;
            match context {
                Some(context) => to_lua(lua, &context),
                None => Ok(LuaValue::Table(lua.create_table()?)),
            }
        });
        methods.add_method("clearRouteCache", |lua, this, ()| {
            this.look(lua, |view| match view.is_request && view.open {
                true => {
                    view.clear_route = true;
                    Ok(())
                }
                false => Err(Error::runtime(
                    "clearRouteCache() is for requests that have not gone on",
                )),
            })
        });
        methods.add_method(
            "setUpstreamOverrideHost",
            |lua, this, (host, strict): (LuaString, Option<bool>)| {
                let host = host.to_string_lossy();
                if !is_address(&host) {
                    return Err(Error::runtime("host is not a valid IP address"));
                }
                this.look(lua, |view| match view.is_request && view.open {
                    true => {
                        view.override_host = Some((host.into(), strict.unwrap_or(false)));
                        Ok(())
                    }
                    false => Err(Error::runtime(
                        "setUpstreamOverrideHost() is for requests that have not gone on",
                    )),
                })
            },
        );
        methods.add_method("base64Escape", |lua, this, text: LuaString| {
            this.look(lua, |_| Ok(()))?;
            lua.create_string(STANDARD.encode(&*text.as_bytes()))
        });
        methods.add_method("timestamp", |_, _, resolution: LuaValue| {
            Ok(now(&resolution)? as f64)
        });
        methods.add_method("timestampString", |_, _, resolution: LuaValue| {
            Ok(now(&resolution)?.to_string())
        });
        methods.add_method(
            "importPublicKey",
            |_, _, (der, length): (LuaString, usize)| PublicKey::import(&der, length),
        );
        methods.add_method("verifySignature", |lua, _, signed| key::verify(lua, signed));
        for name in LOGS {
            methods.add_method(name, move |_, _, line: LuaString| {
                log(name, &line.to_string_lossy());
                Ok(())
            });
        }
    }
}

impl Handle {
    fn look<R>(
        self,
        lua: &Lua,
        look: impl FnOnce(&mut View) -> mlua::Result<R>,
    ) -> mlua::Result<R> {
        with(lua, Token::Run(self.0), look)
    }

    /// An object that lives until the next wait.
    fn object<T>(self, lua: &Lua, make: impl FnOnce(Token) -> T) -> mlua::Result<T> {
        self.look(lua, |_| Ok(()))?;
        Ok(make(token(lua)))
    }
}

/// What a method that may wait gives to its half in Lua.
type Begun = mlua::Result<(bool, Option<LuaValue>)>;

const WAIT: Begun = Ok((false, None));
const NOTHING: Begun = Ok((true, None));

fn object(lua: &Lua, object: impl UserData + 'static) -> Begun {
    Ok((true, Some(LuaValue::UserData(lua.create_userdata(object)?))))
}

/// Looks at the view of a handle that begins to wait.
fn begin<R>(
    lua: &Lua,
    handle: &AnyUserData,
    look: impl FnOnce(&mut View) -> mlua::Result<R>,
) -> mlua::Result<R> {
    let handle = *handle.borrow::<Handle>()?;
    handle.look(lua, |view| match view.wants {
        Some(_) => Err(Error::runtime("the script waits for something else")),
        None => look(view),
    })
}

fn begin_body(lua: &Lua, (handle, wrap): (AnyUserData, Option<bool>)) -> Begun {
    let wrap = wrap.unwrap_or(false);
    let ready = begin(lua, &handle, |view| {
        if view.is_tunnel() {
            return Err(Error::runtime("body() cannot be called on an upgrade"));
        }
        if view.streamed && view.body.is_none() {
            return Err(Error::runtime(match view.is_over() {
                true => "cannot call body() after body has been streamed",
                false => "cannot call body() after body streaming has started",
            }));
        }
        if view.body.is_none() && !view.is_over() {
            view.wants = Some(Wants::Body);
            view.wrap = wrap;
            return Ok(None);
        }
        view.ended = true;
        let body = view.body.get_or_insert_default();
        Ok(Some(wrap || !body.is_empty()))
    })?;
    match ready {
        None => WAIT,
        Some(false) => NOTHING,
        Some(true) => object(lua, Buffer::Whole(token(lua))),
    }
}

fn begin_chunks(lua: &Lua, handle: AnyUserData) -> mlua::Result<()> {
    begin(lua, &handle, |view| {
        if view.streamed {
            return Err(Error::runtime(
                "cannot call bodyChunks after body processing has begun",
            ));
        }
        match view.is_tunnel() {
            true => Err(Error::runtime(
                "bodyChunks() cannot be called on an upgrade",
            )),
            false => Ok(()),
        }
    })
}

fn begin_chunk(lua: &Lua, handle: AnyUserData) -> Begun {
    let whole = begin(lua, &handle, |view| {
        // A body that is in hand already is one piece.
        if let Some(body) = &view.body {
            let first = !view.streamed && !body.is_empty();
            view.streamed = true;
            return Ok(Some(first));
        }
        if view.is_over() {
            return Ok(Some(false));
        }
        view.wants = Some(Wants::Chunk);
        Ok(None)
    })?;
    match whole {
        None => WAIT,
        Some(false) => NOTHING,
        Some(true) => object(lua, Buffer::Whole(token(lua))),
    }
}

fn begin_trailers(lua: &Lua, handle: AnyUserData) -> Begun {
    let there = begin(lua, &handle, |view| {
        if view.trailers.is_none() && !view.is_over() {
            view.wants = Some(Wants::Trailers);
            return Ok(None);
        }
        Ok(Some(view.trailers.is_some()))
    })?;
    match there {
        None => WAIT,
        Some(false) => NOTHING,
        Some(true) => object(
            lua,
            HeaderMap {
                token: token(lua),
                trailers: true,
            },
        ),
    }
}

fn begin_call(lua: &Lua, (handle, given): (AnyUserData, MultiValue)) -> Begun {
    let worker = begin(lua, &handle, |view| Ok(view.about.worker.clone()))?;
    let call = Call::read(given, &worker)?;
    begin(lua, &handle, |view| {
        if call.asynchronous {
            if view.calls.len() >= MOST_CALLS {
                return Err(Error::runtime("too many asynchronous http calls at once"));
            }
            view.calls.push(call);
            return Ok(true);
        }
        if !view.open {
            return Err(Error::runtime(
                "httpCall() cannot wait once the headers have gone on; make it asynchronous, or before",
            ));
        }
        view.wants = Some(Wants::Call(Box::new(call)));
        Ok(false)
    })
    .map(|ready| (ready, None))
}

fn begin_respond(lua: &Lua, (handle, headers, body): (AnyUserData, LuaValue, LuaValue)) -> Begun {
    begin(lua, &handle, |view| match (view.is_request, view.open) {
        (false, _) => Err(Error::runtime(
            "respond not currently supported in the response path",
        )),
        (true, false) => Err(Error::runtime(
            "respond() cannot be called if headers have been continued",
        )),
        (true, true) => Ok(()),
    })?;
    let LuaValue::Table(headers) = headers else {
        return Err(Error::runtime("bad argument #1: a table is expected"));
    };
    let fields = call::fields(&headers)?;
    let status = fields.iter().find(|(name, _)| name == ":status");
    let status = status
        .and_then(|(_, value)| std::str::from_utf8(value).ok()?.parse().ok())
        .filter(|status| (200..600).contains(status))
        .ok_or_else(|| Error::runtime(":status must be between 200-599"))?;
    let body = match body {
        LuaValue::Nil => bytes::Bytes::new(),
        body => call::bytes(&body, 2)?,
    };
    begin(lua, &handle, |view| {
        view.wants = Some(Wants::Respond {
            status,
            headers: call::plain_headers(&fields),
            body,
        });
        Ok(())
    })?;
    WAIT
}

/// Asynchronous calls that one resumption may make.
const MOST_CALLS: usize = 32;

/// An IP address, alone or with a port.
fn is_address(text: &str) -> bool {
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    text.parse::<std::net::SocketAddr>().is_ok()
        || bare.unwrap_or(text).parse::<std::net::IpAddr>().is_ok()
}

/// Milliseconds, or microseconds, since the epoch.
fn now(resolution: &LuaValue) -> mlua::Result<u128> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since = since.unwrap_or_default();
    let number = match resolution {
        LuaValue::Nil => 0.0,
        LuaValue::Integer(number) => *number as f64,
        LuaValue::Number(number) => *number,
        _ => -1.0,
    };
    match number {
        0.0 => Ok(since.as_millis()),
        1.0 => Ok(since.as_micros()),
        _ => Err(Error::runtime(
            "timestamp format must be MILLISECOND or MICROSECOND",
        )),
    }
}

const LOGS: [&str; 6] = [
    "logTrace",
    "logDebug",
    "logInfo",
    "logWarn",
    "logErr",
    "logCritical",
];

fn log(method: &str, line: &str) {
    match method {
        "logTrace" => tracing::trace!(target: LOG, "script log: {line}"),
        "logDebug" => tracing::debug!(target: LOG, "script log: {line}"),
        "logInfo" => tracing::info!(target: LOG, "script log: {line}"),
        "logWarn" => tracing::warn!(target: LOG, "script log: {line}"),
        _ => tracing::error!(target: LOG, "script log: {line}"),
    }
}
