//! What filters tell each other, routes, load balancing and logs: named objects, of a connection or of a request.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use serde_json::Value;

use crate::{
    access_log::{self, Lines},
    http::Exchange,
    plan::filter_state::{ObjectKind, StateValue},
};

/// The objects of a connection, or of a request.
#[derive(Debug, Clone, Default)]
pub struct FilterState {
    objects: Vec<Object>,
}

#[derive(Debug, Clone)]
struct Object {
    key: Arc<str>,
    kind: ObjectKind,
    value: Value,
    read_only: bool,
}

impl FilterState {
    /// The object with this key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.find(key).map(|object| &object.value)
    }

    /// The object with this key, where hash policies go by such objects.
    pub(crate) fn hashable(&self, key: &str) -> Option<&Value> {
        let object = self.find(key)?;
        matches!(object.kind, ObjectKind::Own | ObjectKind::HashableText).then_some(&object.value)
    }

    /// The object of a kind that something acts by, under the key that it is looked for.
    pub(crate) fn well_known(&self, kind: ObjectKind) -> Option<&Value> {
        if self.objects.is_empty() {
            return None;
        }
        let object = self.find(kind.well_known()?)?;
        (object.kind == kind).then_some(&object.value)
    }

    /// The TCP proxy's idle timeout of this connection.
    pub(crate) fn idle_timeout(&self) -> Option<Duration> {
        let millis = self.well_known(ObjectKind::TcpIdleTimeout)?.as_u64()?;
        Some(Duration::from_millis(millis))
    }

    /// Puts an object of a filter's own in the place of an earlier one.
    pub(crate) fn set(&mut self, key: Arc<str>, value: Value) {
        self.put(Object {
            key,
            kind: ObjectKind::Own,
            value,
            read_only: false,
        });
    }

    /// Makes the object that a configured value asks for from its text. What is no such object is left out, as Envoy
    /// does.
    pub(crate) fn make(&mut self, plan: &StateValue, text: Vec<u8>) {
        if text.is_empty() && plan.skip_if_empty {
            return;
        }
        let text = String::from_utf8_lossy(&text);
        let value = match plan.kind {
            ObjectKind::TcpIdleTimeout => text.parse::<u64>().ok().map(Value::from),
            ObjectKind::HitsAddend => text.parse::<u32>().ok().map(Value::from),
            ObjectKind::DisableTunneling => text.parse::<bool>().ok().map(Value::from),
            ObjectKind::OriginalDst => {
                let address = text.parse::<SocketAddr>().ok();
                address.map(|address| address.to_string().into())
            }
            _ => Some(text.as_ref().into()),
        };
        let Some(value) = value else {
            tracing::debug!(key = &*plan.key, %text, "no object of filter state can be made");
            return;
        };
        self.put(Object {
            key: plan.key.clone(),
            kind: plan.kind,
            value,
            read_only: plan.read_only,
        });
    }

    fn find(&self, key: &str) -> Option<&Object> {
        self.objects.iter().find(|object| &*object.key == key)
    }

    fn put(&mut self, new: Object) {
        let old = self.objects.iter_mut().find(|old| old.key == new.key);
        match old {
            Some(old) if old.read_only => {
                tracing::debug!(key = &*new.key, "the object of filter state is read-only");
            }
            Some(old) => *old = new,
            None => self.objects.push(new),
        }
    }
}

/// The text that a value is made of.
pub(crate) fn text(plan: &StateValue, exchange: &Exchange<'_>) -> Vec<u8> {
    let mut text = Vec::new();
    access_log::write(&plan.format, exchange, Lines::Any, &mut text);
    text
}

/// The protocols that a text with commas names.
pub(crate) fn protocols(value: &Value) -> Option<Arc<[Arc<str>]>> {
    let names = value.as_str()?.split(',').map(str::trim);
    let names: Arc<[Arc<str>]> = names.filter(|n| !n.is_empty()).map(Arc::from).collect();
    (!names.is_empty()).then_some(names)
}
