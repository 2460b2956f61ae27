//! `importPublicKey()` and `verifySignature()`.

use mlua::{Error, Lua, LuaString, UserData, UserDataMethods, UserDataRef};

/// A public key, as it came.
#[derive(Debug)]
pub(super) struct PublicKey(Vec<u8>);

impl PublicKey {
    pub(super) fn import(der: &LuaString, length: usize) -> mlua::Result<PublicKey> {
        Ok(PublicKey(part(der, length)?))
    }
}

impl UserData for PublicKey {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("get", |lua, this, ()| match this.0.is_empty() {
            true => Ok(None),
            false => lua.create_string(&this.0).map(Some),
        });
    }
}

/// What a script gives to `verifySignature()`.
pub(super) type Signed = (
    LuaString,
    UserDataRef<PublicKey>,
    LuaString,
    usize,
    LuaString,
    usize,
);

/// Whether the signature is right, and what is wrong with it.
pub(super) fn verify(
    lua: &Lua,
    (hash, key, signature, signature_length, data, data_length): Signed,
) -> mlua::Result<(bool, LuaString)> {
    let signature = part(&signature, signature_length)?;
    let data = part(&data, data_length)?;
    let verified = tls::signature::verify(&hash.to_string_lossy(), &key.0, &signature, &data);
    match verified {
        Ok(()) => Ok((true, lua.create_string("")?)),
        Err(why) => Ok((false, lua.create_string(why.to_string())?)),
    }
}

/// So many bytes of a text.
fn part(text: &LuaString, length: usize) -> mlua::Result<Vec<u8>> {
    let bytes = text.as_bytes();
    let part = bytes.get(..length).map(<[u8]>::to_vec);
    part.ok_or_else(|| Error::runtime("a length must not be more than that of its string"))
}
