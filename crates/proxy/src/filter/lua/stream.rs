//! `streamInfo()`, `connection()` and `connectionStreamInfo()`.

use std::net::SocketAddr;

use mlua::{Lua, LuaString, UserData, UserDataMethods, Value as LuaValue};

use super::{
    ssl::SslConnection,
    values::{DynamicMetadata, FilterState},
    view::{About, Token, with},
};

/// `streamInfo()`.
#[derive(Debug, Clone, Copy)]
pub(super) struct StreamInfo(pub(super) Token);

impl StreamInfo {
    fn address(
        self,
        lua: &Lua,
        pick: impl FnOnce(&About) -> Option<SocketAddr>,
    ) -> mlua::Result<String> {
        with(lua, self.0, |view| {
            Ok(pick(&view.about).map_or_else(String::new, |address| address.to_string()))
        })
    }
}

impl UserData for StreamInfo {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("protocol", |lua, this, ()| {
            with(lua, this.0, |view| Ok(view.about.version.as_str()))
        });
        methods.add_method("routeName", |lua, this, ()| {
            with(lua, this.0, |view| {
                let route = view.about.route.route();
                Ok(route.map_or_else(String::new, |route| route.name.to_string()))
            })
        });
        methods.add_method("virtualClusterName", |lua, this, ()| {
            with(lua, this.0, |view| {
                Ok(view.about.virtual_cluster.clone().unwrap_or_default())
            })
        });
        for name in ["downstreamLocalAddress", "downstreamDirectLocalAddress"] {
            methods.add_method(name, |lua, this, ()| this.address(lua, |about| about.local));
        }
        methods.add_method("downstreamRemoteAddress", |lua, this, ()| {
            this.address(lua, |about| about.remote)
        });
        methods.add_method("downstreamDirectRemoteAddress", |lua, this, ()| {
            this.address(lua, |about| about.direct_remote)
        });
        methods.add_method("requestedServerName", |lua, this, ()| {
            with(lua, this.0, |view| {
                let name = view.about.server_name.as_deref();
                Ok(name.unwrap_or_default().to_owned())
            })
        });
        methods.add_method("dynamicMetadata", |lua, this, ()| {
            with(lua, this.0, |_| {
                Ok(DynamicMetadata {
                    token: this.0,
                    connection: false,
                })
            })
        });
        methods.add_method("dynamicTypedMetadata", no_typed_metadata);
        methods.add_method("filterState", |lua, this, ()| {
            with(lua, this.0, |_| Ok(FilterState(this.0)))
        });
        methods.add_method("downstreamSslConnection", |lua, this, ()| ssl(lua, this.0));
    }
}

/// `connection()`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Connection(pub(super) Token);

impl UserData for Connection {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("ssl", |lua, this, ()| ssl(lua, this.0));
        methods.add_method("streamInfo", |lua, this, ()| {
            with(lua, this.0, |_| Ok(ConnectionStreamInfo(this.0)))
        });
    }
}

/// `connectionStreamInfo()`.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionStreamInfo(pub(super) Token);

impl UserData for ConnectionStreamInfo {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("dynamicMetadata", |lua, this, ()| {
            with(lua, this.0, |_| {
                Ok(DynamicMetadata {
                    token: this.0,
                    connection: true,
                })
            })
        });
        methods.add_method("dynamicTypedMetadata", no_typed_metadata);
    }
}

/// No filter here leaves typed metadata, so that there never is any of this name.
fn no_typed_metadata<T>(_: &Lua, _: &T, _: LuaString) -> mlua::Result<LuaValue> {
    Ok(LuaValue::Nil)
}

fn ssl(lua: &Lua, token: Token) -> mlua::Result<Option<SslConnection>> {
    with(lua, token, |view| {
        Ok(view.about.tls.is_some().then_some(SslConnection(token)))
    })
}
