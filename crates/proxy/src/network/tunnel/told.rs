//! What is known of a tunnel beside its bytes, for logs.

use std::{cell::RefCell, sync::Arc};

use outrigger_http::{Headers, ResponseHead};
use serde_json::{Value, json};

use crate::{http::Exchange, plan::network::Tunneling, worker::Random};

/// What a tunnel is called, and what its proxy has said.
#[derive(Debug, Default)]
pub(in crate::network) struct Told {
    /// The key of dynamic metadata, and the id.
    request_id: Option<(Arc<str>, String)>,
    /// Whether they are wanted, and what came.
    headers: Option<RefCell<Value>>,
    trailers: Option<RefCell<Value>>,
}

impl Told {
    pub(super) fn new(plan: &Tunneling, random: &Random) -> Self {
        let wanted = |wanted: bool| wanted.then(RefCell::default);
        Self {
            request_id: plan.request_id.as_ref().map(|request_id| {
                let id = random.uuid().hyphenated().to_string();
                (request_id.metadata_key.clone(), id)
            }),
            headers: wanted(plan.propagate_headers),
            trailers: wanted(plan.propagate_trailers),
        }
    }

    pub(super) fn request_id(&self) -> Option<&str> {
        self.request_id.as_ref().map(|(_, id)| &**id)
    }

    /// The final answer to the request, whether it opens the tunnel or not.
    pub(super) fn answer(&self, head: &ResponseHead) {
        if let Some(kept) = &self.headers {
            let status = field(":status", head.status.to_string().as_bytes());
            kept.replace(header_map(Some(status), &head.headers));
        }
    }

    pub(super) fn trailers(&self, trailers: &Headers) {
        if let Some(kept) = &self.trailers {
            kept.replace(header_map(None, trailers));
        }
    }

    /// Leaves it where logs look.
    pub(in crate::network) fn show(&self, exchange: &mut Exchange<'_>) {
        if let Some((key, id)) = &self.request_id {
            let namespace = exchange.dynamic_metadata.entry(NAMESPACE.to_owned());
            let own = namespace.or_insert_with(|| json!({}));
            if let Value::Object(own) = own {
                own.insert(key.to_string(), id.as_str().into());
            }
        }
        for (key, kept) in [(HEADERS, &self.headers), (TRAILERS, &self.trailers)] {
            if let Some(kept) = kept
                && !kept.borrow().is_null()
            {
                exchange.set_state(key.into(), kept.borrow().clone());
            }
        }
    }
}

/// As Envoy prints `envoy.config.core.v3.HeaderMap`.
fn header_map(first: Option<Value>, headers: &Headers) -> Value {
    let fields = headers.iter().map(|(name, value)| field(name, value));
    let all: Vec<_> = first.into_iter().chain(fields).collect();
    json!({ "headers": all })
}

fn field(name: &str, value: &[u8]) -> Value {
    json!({ "key": name.to_ascii_lowercase(), "value": String::from_utf8_lossy(value) })
}

/// Namespace of dynamic metadata.
const NAMESPACE: &str = "envoy.filters.network.tcp_proxy";
/// Keys of filter state.
const HEADERS: &str = "envoy.tcp_proxy.propagate_response_headers";
const TRAILERS: &str = "envoy.tcp_proxy.propagate_response_trailers";
