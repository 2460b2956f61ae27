//! Scripts in Lua: what they are compiled to, what they may reach, and how long they may run.
//!
//! A [`Machine`] is one Lua state with one script. It is LuaJIT with its compiler switched off: compiled loops could not be
//! interrupted. A script reaches its own globals, the libraries of tables, strings, numbers, bits and coroutines, the
//! clock and the environment; nothing that opens files, starts processes, or loads code that is no text. A hook counts
//! what it executes, in every coroutine of it, and its allocations have a limit.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mlua::{
    Error, Function, HookTriggers, Lua, LuaOptions, MultiValue, StdLib, Table, Value, VmState,
    chunk::ChunkMode,
};

/// Where scripts log: the component `lua`, wherever in the code it is said.
pub(crate) const LOG: &str = "outrigger_proxy::lua";

/// A script as configured.
#[derive(Clone, PartialEq, Eq)]
pub struct Script {
    /// The field that it stands in; errors name it.
    pub field: &'static str,
    /// Its text.
    pub source: Bytes,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Script({}, {} bytes)", self.field, self.source.len())
    }
}

impl Script {
    /// Compiles the script and runs what it does outside of functions, as every worker will.
    ///
    /// # Errors
    /// What is wrong, with its line.
    pub fn check(&self) -> Result<(), String> {
        match Machine::new(self, Limits::default()) {
            Ok(_) => Ok(()),
            Err(error) => Err(message(&error)),
        }
    }

    /// Whether the script might replace bytes of a body.
    pub(crate) fn may_set_bytes(&self) -> bool {
        memchr::memmem::find(&self.source, b"setBytes").is_some()
    }
}

/// What a script may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Instructions of the virtual machine from one wait to the next; about fifty million a second.
    pub(crate) instructions: u64,
    /// How long it may run so, since one call of a library may take as long as many instructions.
    pub(crate) time: Duration,
    /// Bytes that a state may hold.
    pub(crate) memory: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            instructions: 20_000_000,
            time: Duration::from_secs(1),
            memory: 32 << 20,
        }
    }
}

/// A Lua state with a script in it.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) lua: Lua,
    limits: Limits,
    /// `envoy_on_request`, where the script has it.
    pub(crate) on_request: Option<Function>,
    /// `envoy_on_response`, where the script has it.
    pub(crate) on_response: Option<Function>,
}

/// What is left of the instructions, in a state's own data.
#[derive(Debug)]
struct Budget {
    left: Cell<u64>,
    until: Cell<Instant>,
    limits: Limits,
}

impl Machine {
    /// A new state that has run the script once.
    pub(crate) fn new(script: &Script, limits: Limits) -> Result<Machine, Error> {
        let lua = Lua::new_with(libraries(), LuaOptions::default())?;
        lua.set_memory_limit(limits.memory)?;
        lua.set_app_data(Budget {
            left: Cell::new(limits.instructions),
            until: Cell::new(Instant::now() + limits.time),
            limits,
        });
        confine(&lua)?;
        resolutions(&lua)?;
        let every = HookTriggers::new().every_nth_instruction(STRIDE as u32);
        lua.set_global_hook(every, |lua, _| spend(lua))?;
        lua.load(&script.source[..])
            .set_name(format!("={}", script.field))
            .set_mode(ChunkMode::Text)
            .exec()?;
        let function = |name| match lua.globals().raw_get::<Value>(name) {
            Ok(Value::Function(function)) => Some(function),
            _ => None,
        };
        let (on_request, on_response) =
            (function("envoy_on_request"), function("envoy_on_response"));
        Ok(Machine {
            lua,
            limits,
            on_request,
            on_response,
        })
    }

    /// Gives the script its instructions anew: it runs on from a wait.
    pub(crate) fn refill(&self) {
        if let Some(budget) = self.lua.app_data_ref::<Budget>() {
            budget.left.set(self.limits.instructions);
            budget.until.set(Instant::now() + self.limits.time);
        }
    }
}

/// What an error says, in one line where it is one: what is wrong, behind the place in the script.
pub(crate) fn message(error: &Error) -> String {
    match error {
        Error::CallbackError { traceback, cause } => {
            let text = message(cause);
            // What the proxy finds wrong has no place; the first line of the script on the stack called it.
            let place = traceback.lines().map(str::trim).find_map(|line| {
                let (place, _) = line.split_once(": in ")?;
                (!line.starts_with('[')).then_some(place)
            });
            match place {
                Some(place) if !text.starts_with(place) => format!("{place}: {text}"),
                _ => text,
            }
        }
        Error::RuntimeError(text) | Error::MemoryError(text) => first_part(text).to_owned(),
        Error::SyntaxError { message, .. } => message.clone(),
        Error::BadArgument { pos, cause, .. } => {
            format!("bad argument #{pos} ({})", message(cause))
        }
        other => other.to_string(),
    }
}

/// Whether a state has come to the end of its memory.
pub(crate) fn is_memory(error: &Error) -> bool {
    match error {
        Error::CallbackError { cause, .. } => is_memory(cause),
        Error::MemoryError(_) => true,
        Error::RuntimeError(text) => text.contains("not enough memory"),
        _ => false,
    }
}

/// A message without the stack below it.
fn first_part(text: &str) -> &str {
    text.split("\nstack traceback:").next().unwrap_or(text)
}

/// Takes a stride off what is left, and looks at the clock; nothing left ends the script, whatever it catches.
fn spend(lua: &Lua) -> mlua::Result<VmState> {
    let Some(budget) = lua.app_data_ref::<Budget>() else {
        return Ok(VmState::Continue);
    };
    match budget.left.get().checked_sub(STRIDE) {
        Some(left) if left > 0 && Instant::now() < budget.until.get() => {
            budget.left.set(left);
            Ok(VmState::Continue)
        }
        _ => {
            budget.left.set(0);
            Err(Error::runtime(format!(
                "the script was ended: it ran for {} instructions or {:?} without a wait (an endless loop?)",
                budget.limits.instructions, budget.limits.time
            )))
        }
    }
}

/// Takes away what would reach out of the state, and wraps what would let a script go on after its end.
fn confine(lua: &Lua) -> mlua::Result<()> {
    let globals = lua.globals();
    // The compiler is a matter of the whole state.
    let jit: Table = globals.raw_get("jit")?;
    jit.get::<Function>("off")?.call::<()>(())?;
    for name in TAKEN {
        globals.raw_set(name, Value::Nil)?;
    }
    let strings: Table = globals.raw_get("string")?;
    strings.raw_set("dump", Value::Nil)?;
    let os: Table = globals.raw_get("os")?;
    for name in TAKEN_FROM_OS {
        os.raw_set(name, Value::Nil)?;
    }
    let expired = lua.create_function(|lua, ()| {
        Ok(lua
            .app_data_ref::<Budget>()
            .is_some_and(|budget| budget.left.get() == 0))
    })?;
    // Errors of the proxy are objects to Lua; a script knows errors as texts.
    let text = lua.create_function(|_, value: Value| match value {
        Value::Error(error) => Ok(Some(message(&error))),
        _ => Ok(None),
    })?;
    let print = lua.create_function(|lua, values: MultiValue| {
        let mut line = String::new();
        for value in values {
            if !line.is_empty() {
                line.push('\t');
            }
            let shown = lua.globals().get::<Function>("tostring")?;
            line.push_str(&shown.call::<mlua::LuaString>(value)?.to_string_lossy());
        }
        tracing::info!("script print: {line}");
        Ok(())
    })?;
    globals.raw_set("print", print)?;
    lua.load(PRELUDE)
        .set_name("=prelude")
        .call::<()>((expired, text))
}

/// The one global of Envoy's.
fn resolutions(lua: &Lua) -> mlua::Result<()> {
    let table = lua.create_table()?;
    table.raw_set("MILLISECOND", 0)?;
    table.raw_set("MICROSECOND", 1)?;
    lua.globals().raw_set("EnvoyTimestampResolution", table)
}

/// Instructions between two looks at the budget.
const STRIDE: u64 = 10_000;

/// The libraries that scripts find, and the one by which the compiler is switched off.
fn libraries() -> StdLib {
    StdLib::TABLE | StdLib::STRING | StdLib::MATH | StdLib::BIT | StdLib::OS | StdLib::JIT
}

/// Globals that load files, code that is no text, or reach below the language.
const TAKEN: [&str; 10] = [
    "collectgarbage",
    "debug",
    "dofile",
    "ffi",
    "io",
    "jit",
    "loadfile",
    "newproxy",
    "package",
    "require",
];

/// What of `os` is more than the time and the environment.
const TAKEN_FROM_OS: [&str; 6] = [
    "execute",
    "exit",
    "remove",
    "rename",
    "setlocale",
    "tmpname",
];

/// `pcall` and its like end with the script (all coroutines share one count of instructions, so that the next look at it
/// may be far), and tell errors as texts; code is loaded from text alone.
const PRELUDE: &str = r#"
local expired, text = ...
local pcall, xpcall, error, type, load = pcall, xpcall, error, type, load
local function caught(ok, err, ...)
  if ok then return ok, err, ... end
  if expired() then error(err, 0) end
  if type(err) == "userdata" then err = text(err) or err end
  return ok, err, ...
end
_G.pcall = function(f, ...) return caught(pcall(f, ...)) end
_G.xpcall = function(f, handler, ...)
  return caught(xpcall(f, function(err)
    if expired() then return err end
    if type(err) == "userdata" then err = text(err) or err end
    return handler(err)
  end, ...))
end
local resume = coroutine.resume
coroutine.resume = function(...) return caught(resume(...)) end
_G.load = function(chunk, name, mode, ...) return load(chunk, name, "t", ...) end
_G.loadstring = function(chunk, name) return load(chunk, name, "t") end
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn script(source: &str) -> Script {
        Script {
            field: "inline_code",
            source: source.to_owned().into(),
        }
    }

    fn wrong(source: &str) -> String {
        script(source).check().unwrap_err()
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        assert_eq!(script("function envoy_on_request(h) end").check(), Ok(()));
        assert_eq!(
            wrong("\nfunction f(\n"),
            "inline_code:3: <name> or '...' expected near '<eof>'"
        );
        assert_eq!(
            wrong("\nlocal x = nil + 1"),
            "inline_code:2: attempt to perform arithmetic on a nil value"
        );
        assert_eq!(wrong("error('no', 0)"), "no");
        assert!(wrong("\x1bLJ\x02").contains("attempt to load"));
    }

    #[test]
    fn nothing_reaches_out_of_the_state() {
        for name in [
            "io", "debug", "ffi", "jit", "package", "require", "dofile", "loadfile", "newproxy",
        ] {
            assert_eq!(script(&format!("assert({name} == nil)")).check(), Ok(()));
        }
        for name in ["execute", "exit", "remove", "rename", "tmpname"] {
            assert_eq!(script(&format!("assert(os.{name} == nil)")).check(), Ok(()));
        }
        let kept = "assert(os.time() > 0 and os.date() and bit.band(6, 3) == 2)
            assert(load('return 7')() == 7 and not load('\\27LJ'))
            assert(not loadstring('\\27LJ', 'x', 'b') and not string.dump)
            goto done
            ::done::";
        assert_eq!(script(kept).check(), Ok(()));
    }

    #[test]
    fn nothing_runs_for_ever() {
        for source in [
            "while true do end",
            "while true do pcall(function() while true do end end) end",
            "while true do xpcall(function() while true do end end, function() end) end",
            "coroutine.wrap(function() while true do end end)()",
            "while true do local f = coroutine.create(function() while true do end end) coroutine.resume(f) end",
            "local f f = function() return f() end f()",
            "while true do pcall(string.rep, 'x', 1e9) end",
        ] {
            let error = wrong(source);
            assert!(
                error.contains("the script was ended: it ran for 20000000 instructions or 1s"),
                "{source}: {error}"
            );
        }
    }

    #[test]
    fn memory_has_an_end() {
        for source in [
            "local s = 'x' while true do s = s .. s end",
            "string.rep('x', 1e9)",
            "local t = {} for i = 1, 1e9 do t[i] = {i} end",
        ] {
            let error = wrong(source);
            assert!(error.contains("not enough memory"), "{source}: {error}");
        }
    }

    #[test]
    fn an_error_that_is_caught_is_a_text() {
        let source = "local ok, e = pcall(function() error('x') end)
            assert(not ok and e == 'inline_code:1: x', e)
            local ok, e = pcall(error, {1})
            assert(type(e) == 'table')
            local ok, e = xpcall(function(a) error(a, 0) end, function(e) return e .. '!' end, 'y')
            assert(e == 'y!')
            assert(select('#', pcall(function() return 1, nil, nil end)) == 4)";
        assert_eq!(script(source).check(), Ok(()));
    }
}
