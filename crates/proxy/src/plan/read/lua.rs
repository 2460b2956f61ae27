//! The Lua filter. Scripts are compiled, and run once, when their configuration arrives.

use std::sync::Arc;

use proto::envoy::{
    config::core::v3 as core,
    extensions::filters::http::lua::v3::{self as lua, lua_per_route},
};

use super::{common::json, route::body_source};
use crate::{
    lua::Script,
    plan::{
        error::{At, Step, unsupported},
        filter_config::{Lua, LuaPerRoute, RouteScript},
        http_filter::RouteFilterConfig,
    },
};

/// Bytes of a script at most.
const MAX_SCRIPT: usize = 1 << 20;

/// `Lua`.
pub(super) fn lua(at: At<'_>, m: &lua::Lua) -> Step<Lua> {
    #[allow(deprecated)]
    let lua::Lua {
        inline_code,
        source_codes,
        default_source_code,
        stat_prefix,
        clear_route_cache,
        filter_context,
        package_paths,
        package_cpaths,
        shared_vm_id,
    } = m;
    unsupported!(at, package_paths, package_cpaths, shared_vm_id);
    let default = at.optional("default_source_code", default_source_code, |at, m| {
        source(at, m, "default_source_code")
    })?;
    if default.is_some() && !inline_code.is_empty() {
        return Err(at.error("only one of default_source_code, inline_code can be given"));
    }
    let inline = match inline_code.as_str() {
        "" => None,
        code => Some(checked(
            at.field("inline_code"),
            code.to_owned().into(),
            "inline_code",
        )?),
    };
    let named = {
        let at = at.field("source_codes");
        let each = source_codes.iter().filter_map(|(name, m)| {
            let script = source(at.key(name), m, "source_codes").ok()?;
            Some((Arc::from(name.as_str()), script))
        });
        each.collect()
    };
    Ok(Lua {
        default: default.or(inline),
        named,
        stat_prefix: stat_prefix.as_str().into(),
        clear_route_cache: clear_route_cache.unwrap_or(true),
        context: filter_context.as_ref().map(|m| Arc::new(json(m))),
    })
}

/// `LuaPerRoute`.
pub(super) fn lua_per_route(at: At<'_>, m: &lua::LuaPerRoute) -> Step<RouteFilterConfig> {
    use lua_per_route::Override as O;
    let lua::LuaPerRoute {
        filter_context,
        package_paths,
        package_cpaths,
        shared_vm_id,
        r#override,
    } = m;
    unsupported!(at, package_paths, package_cpaths, shared_vm_id);
    let script = match r#override {
        Some(O::Disabled(true)) => return Ok(RouteFilterConfig::Disabled),
        Some(O::Disabled(false)) => {
            return Err(at.field("disabled").error("must be true"));
        }
        Some(O::Name(name)) => RouteScript::Named(at.text("name", name)?),
        Some(O::SourceCode(m)) => {
            RouteScript::Own(source(at.field("source_code"), m, "source_code")?)
        }
        None => RouteScript::Default,
    };
    Ok(RouteFilterConfig::Lua(Arc::new(LuaPerRoute {
        script,
        context: filter_context.as_ref().map(|m| Arc::new(json(m))),
    })))
}

fn source(at: At<'_>, m: &core::DataSource, field: &'static str) -> Step<Arc<Script>> {
    let source = body_source(at, m, MAX_SCRIPT)?;
    checked(at, source, field)
}

fn checked(at: At<'_>, source: bytes::Bytes, field: &'static str) -> Step<Arc<Script>> {
    let script = Script { field, source };
    match script.check() {
        Ok(()) => Ok(Arc::new(script)),
        Err(why) => Err(at.error(format!("script load error: {why}"))),
    }
}
