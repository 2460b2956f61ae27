//! The buffer object: a body, or a piece of one.

use bytes::Bytes;
use mlua::{Error, Lua, LuaString, UserData, UserDataMethods};

use super::view::{Token, View, with};

/// `body()`, or what `bodyChunks()` gives.
#[derive(Debug, Clone, Copy)]
pub(super) enum Buffer {
    /// All of the body, until the next wait.
    Whole(Token),
    /// A piece of the run with this number, by the piece's number.
    Chunk(u64, u64),
}

impl Buffer {
    fn look<R>(
        self,
        lua: &Lua,
        look: impl FnOnce(&mut View) -> mlua::Result<R>,
    ) -> mlua::Result<R> {
        match self {
            Buffer::Whole(token) => with(lua, token, look),
            Buffer::Chunk(run, number) => with(lua, Token::Run(run), |view| {
                if view.chunk.number != number {
                    return Err(Error::runtime("object used outside of proper scope"));
                }
                look(view)
            }),
        }
    }

    fn data(self, lua: &Lua) -> mlua::Result<Bytes> {
        self.look(lua, |view| {
            Ok(match self {
                Buffer::Whole(_) => view.body.clone().unwrap_or_default(),
                Buffer::Chunk(..) => view.chunk.data.clone(),
            })
        })
    }

    fn set(self, view: &mut View, data: Bytes) -> mlua::Result<()> {
        match self {
            Buffer::Whole(_) if !view.open => {
                return Err(Error::runtime("the body has gone on"));
            }
            Buffer::Whole(_) if !view.may_have_body() => {
                return Err(Error::runtime("a response with this status has no body"));
            }
            Buffer::Whole(_) => {
                view.body = Some(data);
                view.body_changed = true;
            }
            Buffer::Chunk(..) => {
                let length = data.len();
                // What a script makes of the last piece when the body has ended follows what it left of it: nothing.
                let last = view.ended && view.trailers.is_none() && view.chunk.data.is_empty();
                if view.chunk.gone && !last {
                    return Err(Error::runtime("this piece of the body has gone on"));
                }
                if view.is_counted() && length != view.chunk.data.len() {
                    return Err(Error::runtime(
                        "the length of this body was told with content-length: remove that header before the body",
                    ));
                }
                view.chunk.data = data;
                view.chunk.changed = true;
            }
        }
        Ok(())
    }
}

impl UserData for Buffer {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("length", |lua, this, ()| Ok(this.data(lua)?.len()));
        methods.add_method("getBytes", |lua, this, (index, length): (i64, i64)| {
            let data = this.data(lua)?;
            let range = usize::try_from(index)
                .ok()
                .zip(usize::try_from(length).ok());
            let bytes =
                range.and_then(|(index, length)| data.get(index..index.checked_add(length)?));
            let bytes = bytes.ok_or_else(|| {
                Error::runtime(
                    "index/length must be >= 0 and (index + length) must be <= buffer size",
                )
            })?;
            lua.create_string(bytes)
        });
        methods.add_method("setBytes", |lua, this, bytes: LuaString| {
            let data = Bytes::copy_from_slice(&bytes.as_bytes());
            let length = data.len();
            this.look(lua, |view| this.set(view, data))?;
            Ok(length)
        });
    }
}
