//! `httpCall()`: a request of the script's own to a cluster.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use mlua::{Error, Lua, LuaString, MultiValue, Table, Value as LuaValue};
use outrigger_http::{Headers, Method, RequestHead, Version};

use super::headers::{legal_name, legal_value, lower};
use crate::{
    filter::{Answer, Pending},
    http::{SideCallError, SideResponse, side_call},
    lua::LOG,
    worker::WorkerRef,
};

/// A call that a script makes.
#[derive(Debug)]
pub(super) struct Call {
    cluster: Arc<str>,
    head: RequestHead,
    body: Bytes,
    timeout: Option<Duration>,
    /// Nobody waits for the answer.
    pub(super) asynchronous: bool,
    /// A repeated header of the answer is a list, not its last value.
    pub(super) duplicates: bool,
}

impl Call {
    /// Reads what a script gives: cluster, headers, body, then a timeout and a flag, or a table of options.
    pub(super) fn read(mut given: MultiValue, worker: &WorkerRef) -> mlua::Result<Call> {
        let mut argument = || given.pop_front().unwrap_or(LuaValue::Nil);
        let (cluster, headers, body) = (argument(), argument(), argument());
        let (fourth, fifth) = (argument(), argument());
        let cluster = text(&cluster, 1)?;
        let LuaValue::Table(headers) = headers else {
            return Err(bad(2, "a table of headers"));
        };
        let body = match body {
            LuaValue::Nil => None,
            body => Some(bytes(&body, 3)?),
        };
        let worker = worker.upgrade();
        if worker.is_none_or(|worker| worker.clusters.find(&cluster).is_none()) {
            return Err(Error::runtime(format!(
                "http call cluster invalid. Must be configured: there is no cluster {cluster}"
            )));
        }
        let fields = fields(&headers)?;
        let pseudo = |name: &str| {
            let found = fields.iter().find(|(key, _)| key == name);
            found.and_then(|(_, value)| std::str::from_utf8(value).ok())
        };
        let (Some(method), Some(path), Some(authority)) =
            (pseudo(":method"), pseudo(":path"), pseudo(":authority"))
        else {
            return Err(Error::runtime(
                "http call headers must include ':path', ':method', and ':authority'",
            ));
        };
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        legal_name(method)?;
        if !plain(path) || !path.starts_with('/') || !plain(authority) {
            return Err(Error::runtime(
                "http call headers ':path' and ':authority' must be as they stand in a request",
            ));
        }
        let mut head =
            RequestHead::new(Version::Http11, Method::from_token(method), authority, path);
        for (name, value) in &fields {
            if !name.starts_with(':') && !OWN.contains(&name.as_str()) {
                head.headers.append(name, value);
            }
        }
        if let Some(body) = &body {
            let length = itoa::Buffer::new().format(body.len()).to_owned();
            head.headers.set("content-length", length);
        }
        let mut call = Call {
            cluster: cluster.into(),
            head,
            body: body.unwrap_or_default(),
            timeout: None,
            asynchronous: false,
            duplicates: false,
        };
        match fourth {
            LuaValue::Table(options) => call.options(&options)?,
            timeout => {
                call.timeout = milliseconds(&timeout, 4)?;
                call.asynchronous = match fifth {
                    LuaValue::Nil => false,
                    LuaValue::Boolean(flag) => flag,
                    _ => {
                        return Err(Error::runtime(
                            "http call asynchronous flag must be 'true', 'false', or empty",
                        ));
                    }
                };
            }
        }
        Ok(call)
    }

    fn options(&mut self, options: &Table) -> mlua::Result<()> {
        for pair in options.pairs::<LuaString, LuaValue>() {
            let (name, value) = pair?;
            let name = name.to_string_lossy();
            let flag = || match value {
                LuaValue::Boolean(flag) => Ok(flag),
                _ => Err(Error::runtime(format!(
                    "http call option {name} must be true or false"
                ))),
            };
            match name.as_str() {
                "asynchronous" => self.asynchronous = flag()?,
                "return_duplicate_headers" => self.duplicates = flag()?,
                "timeout_ms" => self.timeout = milliseconds(&value, 4)?,
                // Calls of filters are no part of traces, and name no client.
                "trace_sampled" | "send_xff" => {
                    flag()?;
                }
                other => {
                    return Err(Error::runtime(format!(
                        "\"{other}\" is not valid key for httpCall() options"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Makes the call; at most `limit` bytes of the answer's body are taken.
    pub(super) fn make(self, worker: WorkerRef, limit: usize) -> Pending {
        Box::pin(async move {
            // A worker that has ended waits for nothing.
            let Some(worker) = worker.upgrade() else {
                return Answer::Ready;
            };
            let request = (self.head, self.body);
            let answer =
                side_call(&worker, &self.cluster, request, false, limit, self.timeout).await;
            if let Err(error) = &answer {
                tracing::debug!(target: LOG, cluster = %self.cluster, %error, "a script's call has no answer");
            }
            Answer::Call(Box::new(answer))
        })
    }
}

/// What a script gets of an answer: a table of headers, and the body where there is one.
pub(super) fn answer(
    lua: &Lua,
    answer: Result<SideResponse, SideCallError>,
    duplicates: bool,
) -> mlua::Result<(Table, Option<LuaString>)> {
    let table = lua.create_table()?;
    let Ok(response) = answer else {
        table.raw_set(":status", "503")?;
        return Ok((table, Some(lua.create_string("upstream failure")?)));
    };
    table.raw_set(":status", response.head.status.to_string())?;
    for (name, value) in response.head.headers.iter() {
        let name = lua.create_string(name.to_ascii_lowercase())?;
        let value = LuaValue::String(lua.create_string(value)?);
        let value = match table.raw_get(&name)? {
            _ if !duplicates => value,
            LuaValue::Nil => value,
            LuaValue::Table(list) => {
                list.raw_push(value)?;
                LuaValue::Table(list)
            }
            first => LuaValue::Table(lua.create_sequence_from([first, value])?),
        };
        table.raw_set(name, value)?;
    }
    let body = match response.body.is_empty() {
        true => None,
        false => Some(lua.create_string(&response.body)?),
    };
    Ok((table, body))
}

/// The fields of a table whose values are texts or lists of texts, the names in lower case.
pub(super) fn fields(table: &Table) -> mlua::Result<Vec<(String, Vec<u8>)>> {
    let mut fields = Vec::new();
    for pair in table.pairs::<LuaValue, LuaValue>() {
        let (name, value) = pair?;
        let LuaValue::String(name) = name else {
            return Err(Error::runtime("the names of headers must be strings"));
        };
        let name = lower(&name)?;
        legal_name(name.strip_prefix(':').unwrap_or(&name))?;
        match value {
            LuaValue::Table(list) => {
                for value in list.sequence_values::<LuaValue>() {
                    fields.push((name.clone(), field(&name, &value?)?));
                }
            }
            value => {
                let value = field(&name, &value)?;
                fields.push((name, value));
            }
        }
    }
    Ok(fields)
}

/// Headers without the pseudo-fields and what tells the end of a message.
pub(super) fn plain_headers(fields: &[(String, Vec<u8>)]) -> Headers {
    let plain = |name: &str| !name.starts_with(':') && !OWN.contains(&name);
    let fields = fields.iter().filter(|(name, _)| plain(name));
    fields.map(|(name, value)| (name, value)).collect()
}

fn field(name: &str, value: &LuaValue) -> mlua::Result<Vec<u8>> {
    match as_bytes(value) {
        Some(value) => legal_value(&value),
        None => Err(Error::runtime(format!(
            "the value of header {name} must be a string, not {}",
            value.type_name()
        ))),
    }
}

fn milliseconds(value: &LuaValue, at: usize) -> mlua::Result<Option<Duration>> {
    let number = match value {
        LuaValue::Integer(number) => *number as f64,
        LuaValue::Number(number) => *number,
        _ => return Err(bad(at, "a timeout in milliseconds")),
    };
    if !(0.0..=1e12).contains(&number) {
        return Err(Error::runtime("http call timeout must be >= 0"));
    }
    Ok((number >= 1.0).then(|| Duration::from_millis(number as u64)))
}

pub(super) fn text(value: &LuaValue, at: usize) -> mlua::Result<String> {
    match value {
        LuaValue::String(text) => Ok(text.to_string_lossy()),
        _ => Err(bad(at, "a string")),
    }
}

pub(super) fn bytes(value: &LuaValue, at: usize) -> mlua::Result<Bytes> {
    as_bytes(value)
        .map(Bytes::from)
        .ok_or_else(|| bad(at, "a string"))
}

/// Texts, and numbers as Lua writes them.
fn as_bytes(value: &LuaValue) -> Option<Vec<u8>> {
    match value {
        LuaValue::String(text) => Some(text.as_bytes().to_vec()),
        LuaValue::Integer(number) => Some(number.to_string().into()),
        LuaValue::Number(number) => Some(number.to_string().into()),
        _ => None,
    }
}

fn bad(at: usize, wanted: &str) -> Error {
    Error::runtime(format!("bad argument #{at}: {wanted} is expected"))
}

/// Fields that say where a message ends, and whose connection it is on.
const OWN: [&str; 4] = ["content-length", "transfer-encoding", "connection", "host"];
