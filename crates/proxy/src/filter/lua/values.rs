//! Values of metadata in Lua, and the objects that give them.

use mlua::{
    Error, Lua, LuaString, MetaMethod, Table, UserData, UserDataMethods, Value as LuaValue,
};
use serde_json::{Map, Value};

use super::view::{Token, View, with};

/// A value as Lua has it: `null` is nil, a list begins at 1.
pub(super) fn to_lua(lua: &Lua, value: &Value) -> mlua::Result<LuaValue> {
    Ok(match value {
        Value::Null => LuaValue::Nil,
        Value::Bool(value) => LuaValue::Boolean(*value),
        Value::Number(number) => LuaValue::Number(number.as_f64().unwrap_or_default()),
        Value::String(text) => LuaValue::String(lua.create_string(text)?),
        Value::Array(list) => {
            let table = lua.create_table()?;
            for (index, value) in list.iter().enumerate() {
                table.raw_set(index + 1, to_lua(lua, value)?)?;
            }
            LuaValue::Table(table)
        }
        Value::Object(map) => LuaValue::Table(table(lua, map)?),
    })
}

fn table(lua: &Lua, map: &Map<String, Value>) -> mlua::Result<Table> {
    let table = lua.create_table()?;
    for (key, value) in map {
        table.raw_set(lua.create_string(key)?, to_lua(lua, value)?)?;
    }
    Ok(table)
}

/// A value of Lua as metadata: a table is a list where its keys are numbers from 1, else a structure.
pub(super) fn from_lua(value: &LuaValue, depth: usize) -> mlua::Result<Value> {
    if depth > MAX_DEPTH {
        return Err(Error::runtime(format!(
            "a table in metadata must not be deeper than {MAX_DEPTH} tables"
        )));
    }
    Ok(match value {
        LuaValue::Nil => Value::Null,
        LuaValue::Boolean(value) => (*value).into(),
        LuaValue::Integer(value) => (*value).into(),
        LuaValue::Number(number) if number.fract() == 0.0 && number.abs() < 9e15 => {
            (*number as i64).into()
        }
        LuaValue::Number(number) if number.is_finite() => (*number).into(),
        LuaValue::Number(_) => return Err(Error::runtime("a number in metadata must be finite")),
        LuaValue::String(text) => text.to_string_lossy().into(),
        LuaValue::Table(table) => {
            let mut pairs = Vec::new();
            for pair in table.pairs::<LuaValue, LuaValue>() {
                pairs.push(pair?);
            }
            let length = table.raw_len();
            let is_index = |key: &LuaValue| {
                matches!(key, LuaValue::Integer(at) if *at >= 1 && *at as usize <= length)
                    || matches!(key, LuaValue::Number(at) if at.fract() == 0.0 && *at >= 1.0 && *at as usize <= length)
            };
            if !pairs.is_empty() && pairs.len() == length && pairs.iter().all(|(k, _)| is_index(k))
            {
                let mut list = Vec::with_capacity(length);
                for at in 1..=length {
                    list.push(from_lua(&table.raw_get(at)?, depth + 1)?);
                }
                return Ok(Value::Array(list));
            }
            let mut map = Map::new();
            for (key, value) in &pairs {
                let LuaValue::String(key) = key else {
                    return Err(Error::runtime(format!(
                        "unexpected type {} in table key (only string keys are supported)",
                        key.type_name()
                    )));
                };
                map.insert(key.to_string_lossy(), from_lua(value, depth + 1)?);
            }
            Value::Object(map)
        }
        other => {
            return Err(Error::runtime(format!(
                "unexpected type '{}' in dynamicMetadata",
                other.type_name()
            )));
        }
    })
}

/// Tables within tables.
const MAX_DEPTH: usize = 32;

/// `metadata()`: what the route says for this filter.
#[derive(Debug, Clone, Copy)]
pub(super) struct RouteMetadata(pub(super) Token);

impl RouteMetadata {
    fn find(view: &View) -> Option<&Map<String, Value>> {
        let metadata = &view.about.route.route()?.metadata;
        let own = metadata.namespace(&view.about.filter);
        own.or_else(|| metadata.namespace(CANONICAL))?.as_object()
    }
}

/// The name of the filter where its configuration gives it another.
const CANONICAL: &str = "envoy.filters.http.lua";

impl UserData for RouteMetadata {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("get", |lua, this, key: LuaString| {
            let key = key.to_string_lossy();
            let found = with(lua, this.0, |view| {
                Ok(Self::find(view).and_then(|map| map.get(&key)).cloned())
            })?;
            to_lua(lua, &found.unwrap_or_default())
        });
        methods.add_meta_method(MetaMethod::Pairs, |lua, this, ()| {
            let all = with(lua, this.0, |view| {
                Ok(Self::find(view).cloned().unwrap_or_default())
            })?;
            pairs(lua, &all)
        });
    }
}

/// `dynamicMetadata()` of the stream, which scripts may write, or of the connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct DynamicMetadata {
    pub(super) token: Token,
    pub(super) connection: bool,
}

impl DynamicMetadata {
    fn all(self, view: &View) -> Map<String, Value> {
        let all = match self.connection {
            true => &view.about.connection_metadata,
            false => &view.metadata,
        };
        all.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

impl UserData for DynamicMetadata {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method("get", |lua, this, name: LuaString| {
            let name = name.to_string_lossy();
            let found = with(lua, this.token, |view| {
                let all = match this.connection {
                    true => &view.about.connection_metadata,
                    false => &view.metadata,
                };
                Ok(all.get(&name).cloned())
            })?;
            to_lua(lua, &found.unwrap_or_default())
        });
        methods.add_method(
            "set",
            |lua, this, (name, key, value): (LuaString, LuaString, LuaValue)| {
                if this.connection {
                    return Err(Error::runtime(
                        "dynamic metadata of a connection cannot be set",
                    ));
                }
                let value = from_lua(&value, 0)?;
                with(lua, this.token, |view| {
                    let space = view.metadata.entry(name.to_string_lossy());
                    let space = space.or_insert_with(|| Value::Object(Map::new()));
                    if !space.is_object() {
                        *space = Value::Object(Map::new());
                    }
                    if let Value::Object(map) = space {
                        map.insert(key.to_string_lossy(), value);
                    }
                    Ok(())
                })
            },
        );
        methods.add_meta_method(MetaMethod::Pairs, |lua, this, ()| {
            let all = with(lua, this.token, |view| Ok(this.all(view)))?;
            pairs(lua, &all)
        });
    }
}

/// What `pairs()` of an object gives: the walk through a table of its own.
fn pairs(lua: &Lua, map: &Map<String, Value>) -> mlua::Result<(mlua::Function, Table)> {
    let next: mlua::Function = lua.globals().raw_get("next")?;
    Ok((next, table(lua, map)?))
}

/// `filterState()`.
#[derive(Debug, Clone, Copy)]
pub(super) struct FilterState(pub(super) Token);

impl UserData for FilterState {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_method(
            "get",
            |lua, this, (name, field): (LuaString, Option<LuaString>)| {
                let (name, field) = (name.to_string_lossy(), field.map(|f| f.to_string_lossy()));
                let found = with(lua, this.0, |view| {
                    let object = view.state.get(&name);
                    let value = match &field {
                        Some(field) => object.and_then(|object| object.get(field)),
                        None => object,
                    };
                    Ok(value.cloned())
                })?;
                to_lua(lua, &found.unwrap_or_default())
            },
        );
    }
}
