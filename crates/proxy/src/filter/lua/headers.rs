//! The header object: a head with its pseudo-fields, or trailers.

use std::cell::Cell;

use mlua::{Error, Lua, LuaString, MetaMethod, UserData, UserDataMethods};
use outrigger_http::{Headers, Method, RequestHead, ResponseHead};

use super::view::{Head, Token, View, with};

/// `headers()` and `trailers()`.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeaderMap {
    pub(super) token: Token,
    pub(super) trailers: bool,
}

impl UserData for HeaderMap {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("get", |lua, this, name: LuaString| {
            let name = lower(&name)?;
            let value = this.look(lua, |fields| Ok(fields.joined(&name)))?;
            value.map(|value| lua.create_string(value)).transpose()
        });
        methods.add_method("getAtIndex", |lua, this, (name, at): (LuaString, f64)| {
            let name = lower(&name)?;
            let value = this.look(lua, |fields| {
                Ok(fields
                    .values(&name)
                    .into_iter()
                    .enumerate()
                    .find_map(|(index, value)| {
                        (index as f64 == at && !value.is_empty()).then_some(value)
                    }))
            })?;
            value.map(|value| lua.create_string(value)).transpose()
        });
        methods.add_method("getNumValues", |lua, this, name: LuaString| {
            let name = lower(&name)?;
            this.look(lua, |fields| Ok(fields.values(&name).len()))
        });
        methods.add_method("add", |lua, this, (name, value): (LuaString, LuaString)| {
            this.change(lua, &name, &value, false)
        });
        methods.add_method(
            "replace",
            |lua, this, (name, value): (LuaString, LuaString)| {
                this.change(lua, &name, &value, true)
            },
        );
        methods.add_method("remove", |lua, this, name: LuaString| {
            let name = lower(&name)?;
            this.edit(lua, |fields| fields.remove(&name))
        });
        methods.add_method("setHttp1ReasonPhrase", |lua, this, phrase: LuaString| {
            let phrase = legal_value(&phrase.as_bytes())?;
            this.edit(lua, |fields| match fields {
                Fields::Response(head) => {
                    head.reason = Some(String::from_utf8_lossy(&phrase).into());
                    Ok(())
                }
                _ => Err(Error::runtime(
                    "setHttp1ReasonPhrase() is for response headers alone",
                )),
            })
        });
        methods.add_meta_method(MetaMethod::Pairs, |lua, this, ()| {
            // What is walked through is what there was at the beginning; changes meanwhile are allowed.
            let all = this.look(lua, |fields| Ok(fields.all()))?;
            let at = Cell::new(0);
            lua.create_function(move |lua, _: mlua::MultiValue| {
                let Some((name, value)) = all.get(at.get()) else {
                    return Ok((None, None));
                };
                at.set(at.get() + 1);
                let (name, value) = (lua.create_string(name)?, lua.create_string(value)?);
                Ok((Some(name), Some(value)))
            })
        });
    }
}

impl HeaderMap {
    fn look<R>(
        &self,
        lua: &Lua,
        look: impl FnOnce(Fields<'_>) -> mlua::Result<R>,
    ) -> mlua::Result<R> {
        with(lua, self.token, |view| look(self.fields(view)?))
    }

    fn edit<R>(
        &self,
        lua: &Lua,
        edit: impl FnOnce(Fields<'_>) -> mlua::Result<R>,
    ) -> mlua::Result<R> {
        with(lua, self.token, |view| {
            if !self.trailers {
                if !view.open {
                    return Err(Error::runtime("header map can no longer be modified"));
                }
                view.clear_route |= view.is_request && view.clears_route;
            }
            edit(self.fields(view)?)
        })
    }

    fn change(
        &self,
        lua: &Lua,
        name: &LuaString,
        value: &LuaString,
        replace: bool,
    ) -> mlua::Result<()> {
        let (name, value) = (lower(name)?, legal_value(&value.as_bytes())?);
        self.edit(lua, |fields| fields.set(&name, &value, replace))
    }

    fn fields<'v>(&self, view: &'v mut View) -> mlua::Result<Fields<'v>> {
        let gone = || Error::runtime("object used outside of proper scope");
        if self.trailers {
            return view
                .trailers
                .as_mut()
                .map(Fields::Trailers)
                .ok_or_else(gone);
        }
        match &mut view.head {
            Head::Request(head) => Ok(Fields::Request(head)),
            Head::Response(head) => Ok(Fields::Response(head)),
            Head::Away => Err(gone()),
        }
    }
}

/// The fields of one block. `host` is `:authority`.
enum Fields<'v> {
    Request(&'v mut RequestHead),
    Response(&'v mut ResponseHead),
    Trailers(&'v mut Headers),
}

impl Fields<'_> {
    fn block(&self) -> &Headers {
        match self {
            Fields::Request(head) => &head.headers,
            Fields::Response(head) => &head.headers,
            Fields::Trailers(trailers) => trailers,
        }
    }

    fn block_mut(&mut self) -> &mut Headers {
        match self {
            Fields::Request(head) => &mut head.headers,
            Fields::Response(head) => &mut head.headers,
            Fields::Trailers(trailers) => trailers,
        }
    }

    fn pseudo(&self, name: &str) -> Option<Vec<u8>> {
        match self {
            Fields::Request(head) => head.get(name).map(<[u8]>::to_vec),
            Fields::Response(head) if name == ":status" => Some(head.status.to_string().into()),
            _ => None,
        }
    }

    fn values(&self, name: &str) -> Vec<Vec<u8>> {
        if name.starts_with(':') {
            return self.pseudo(name).into_iter().collect();
        }
        self.block().get_all(name).map(<[u8]>::to_vec).collect()
    }

    fn joined(&self, name: &str) -> Option<Vec<u8>> {
        if name.starts_with(':') {
            return self.pseudo(name);
        }
        self.block().joined(name).map(std::borrow::Cow::into_owned)
    }

    fn all(&self) -> Vec<(String, Vec<u8>)> {
        let pseudo: &[&str] = match self {
            Fields::Request(_) => &[":authority", ":path", ":method", ":scheme"],
            Fields::Response(_) => &[":status"],
            Fields::Trailers(_) => &[],
        };
        let request = matches!(self, Fields::Request(_));
        let first = pseudo
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.pseudo(name)?)));
        let rest = self
            .block()
            .iter()
            .filter(|(name, _)| !(request && name.eq_ignore_ascii_case("host")))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_vec()));
        first.chain(rest).collect()
    }

    fn set(mut self, name: &str, value: &[u8], replace: bool) -> mlua::Result<()> {
        if name.starts_with(':') || name == "host" && matches!(self, Fields::Request(_)) {
            return self.set_pseudo(name, value);
        }
        legal_name(name)?;
        // Where a message ends is told by what sends it, not by a script; it says so by its body.
        if !FRAMING.contains(&name) {
            match replace {
                true => self.block_mut().set(name, value),
                false => self.block_mut().append(name, value),
            }
        }
        Ok(())
    }

    fn set_pseudo(&mut self, name: &str, value: &[u8]) -> mlua::Result<()> {
        let text = std::str::from_utf8(value)
            .ok()
            .filter(|text| text.bytes().all(|byte| byte.is_ascii_graphic()));
        let wrong = || {
            let value = String::from_utf8_lossy(value);
            Error::runtime(format!("{name} cannot be `{value}`"))
        };
        let text = text.filter(|text| !text.is_empty()).ok_or_else(wrong)?;
        match (self, name) {
            (Fields::Request(head), ":path") if text.starts_with('/') || text == "*" => {
                head.set_path(text);
            }
            (Fields::Request(head), ":authority" | "host") => head.set_authority(text),
            (Fields::Request(head), ":method") if is_token(text) => {
                head.method = Method::from_token(text);
            }
            (Fields::Request(head), ":scheme") if matches!(text, "http" | "https") => {
                head.set_scheme(text);
            }
            (Fields::Response(head), ":status") => {
                let status = text.parse().ok().filter(|s| (200..600).contains(s));
                head.status = status.ok_or_else(wrong)?;
            }
            _ => return Err(wrong()),
        }
        Ok(())
    }

    fn remove(mut self, name: &str) -> mlua::Result<()> {
        if name.starts_with(':') || name == "host" && matches!(self, Fields::Request(_)) {
            return Err(Error::runtime(format!("{name} cannot be removed")));
        }
        legal_name(name)?;
        if name == "content-length" {
            use outrigger_http::Framing;
            let framing = match &mut self {
                Fields::Request(head) => &mut head.framing,
                Fields::Response(head) => &mut head.framing,
                Fields::Trailers(_) => return Ok(()),
            };
            if matches!(framing, Framing::Length(_)) && !framing.is_none() {
                *framing = Framing::Chunked;
            }
        }
        self.block_mut().remove(name);
        Ok(())
    }
}

/// A name in lower case.
pub(super) fn lower(name: &LuaString) -> mlua::Result<String> {
    match name.to_str() {
        Ok(name) => Ok(name.to_ascii_lowercase()),
        Err(_) => Err(Error::runtime("a header's name must be ASCII")),
    }
}

/// Checks the name of a field that is to be written.
pub(super) fn legal_name(name: &str) -> mlua::Result<()> {
    match is_token(name) {
        true => Ok(()),
        false => Err(Error::runtime(format!(
            "`{}` is no name of a header",
            name.escape_default()
        ))),
    }
}

/// Checks a value that is to be written.
pub(super) fn legal_value(value: &[u8]) -> mlua::Result<Vec<u8>> {
    let legal = |&byte: &u8| byte >= b' ' && byte != 0x7f || byte == b'\t';
    match value.iter().all(legal) {
        true => Ok(value.to_vec()),
        false => Err(Error::runtime(
            "a header's value must not have control characters",
        )),
    }
}

fn is_token(text: &str) -> bool {
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(token)
}

/// Fields that say where a message ends.
const FRAMING: [&str; 2] = ["content-length", "transfer-encoding"];
