//! Istio's HTTP metadata exchange: workloads tell each other who they are in two headers.
//!
//! `x-envoy-peer-metadata-id` is the node's id, `x-envoy-peer-metadata` the base64 of a protobuf
//! `Struct`. A server takes both off every request, whoever sent them, and answers with its own
//! only where the client asked by sending its own.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_STANDARD};
use outrigger_http::{Headers, ResponseHead};
use prost::Message;
use prost_types::{Struct, Value as ProtoValue, value::Kind};
use serde_json::{Map, Value};

use super::{Filter, Interests, Step};
use crate::{
    http::Exchange,
    plan::{
        Cluster,
        http_filter::{PeerMetadata, RouteFilterConfig},
    },
    worker::Worker,
};

const METADATA: &str = "x-envoy-peer-metadata";
const ID: &str = "x-envoy-peer-metadata-id";

/// Filter state under which the client's workload is kept.
pub(crate) const DOWNSTREAM_PEER: &str = "downstream_peer";
/// Filter state under which the server's workload is kept.
pub(crate) const UPSTREAM_PEER: &str = "upstream_peer";

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct PeerMetadataFilter {
    config: PeerMetadata,
    id: String,
    encoded: String,
    /// The peers seen last, decoded: most requests come from few.
    known: std::cell::RefCell<Vec<(Vec<u8>, Value)>>,
}

impl PeerMetadataFilter {
    pub(super) fn new(config: PeerMetadata, worker: &Worker) -> PeerMetadataFilter {
        let node = &worker.bootstrap.node;
        PeerMetadataFilter {
            config,
            id: node.id.to_string(),
            encoded: BASE64_STANDARD.encode(to_struct(&workload(&node.metadata)).encode_to_vec()),
            known: std::cell::RefCell::default(),
        }
    }

    /// Reads a peer and takes its headers off; what is malformed counts as nothing.
    fn discover(&self, headers: &mut Headers) -> Option<Value> {
        let peer = headers
            .get(METADATA)
            .and_then(|encoded| self.decode(encoded));
        headers.remove(METADATA);
        headers.remove(ID);
        peer
    }

    fn decode(&self, encoded: &[u8]) -> Option<Value> {
        let mut known = self.known.borrow_mut();
        if let Some((_, peer)) = known.iter().find(|(bytes, _)| bytes == encoded) {
            return Some(peer.clone());
        }
        let bytes = BASE64_STANDARD.decode(encoded).ok()?;
        let peer = workload(&from_struct(Struct::decode(&*bytes).ok()?));
        if known.len() >= KNOWN_PEERS {
            known.remove(0);
        }
        known.push((encoded.to_vec(), peer.clone()));
        Some(peer)
    }
}

const KNOWN_PEERS: usize = 64;

impl Filter for PeerMetadataFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST.and(Interests::RESPONSE)
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        _: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        if self.config.downstream_discovery_headers || self.config.downstream_propagation {
            exchange.filters.peer_asked = exchange.request.headers.contains(ID)
                && exchange.request.headers.contains(METADATA);
            if let Some(peer) = self.discover(&mut exchange.request.headers) {
                exchange.set_state(DOWNSTREAM_PEER.into(), peer);
            }
        }
        if self.config.upstream_propagation && !is_external(exchange, worker) {
            exchange.request.headers.set(ID, &self.id);
            exchange.request.headers.set(METADATA, &self.encoded);
        }
        Step::Continue
    }

    fn response(&self, exchange: &mut Exchange<'_>, response: &mut ResponseHead, _: &Worker) {
        if self.config.upstream_discovery_headers
            && let Some(peer) = self.discover(&mut response.headers)
        {
            exchange.set_state(UPSTREAM_PEER.into(), peer);
        }
        if self.config.downstream_propagation && exchange.filters.peer_asked {
            response.headers.set(ID, &self.id);
            response.headers.set(METADATA, &self.encoded);
        }
    }
}

/// Whether the route leads out of the mesh, where nobody needs to know who we are.
fn is_external(exchange: &Exchange<'_>, worker: &Worker) -> bool {
    use crate::plan::route::ClusterSpecifier;
    let off = |plan: &Cluster| {
        plan.metadata
            .lookup("istio", &["disable_mx"])
            .is_some_and(|value| value == &Value::Bool(true) || value.as_str() == Some("true"))
    };
    match exchange.route.action().map(|action| &action.cluster) {
        Some(ClusterSpecifier::Cluster(name)) => worker
            .clusters
            .find(name)
            .is_some_and(|cluster| off(&cluster.plan)),
        _ => false,
    }
}

/// What is told of a workload: some fields and labels of its node metadata.
pub(crate) fn workload(node: &Value) -> Value {
    let mut peer = Map::new();
    for name in ["NAME", "NAMESPACE", "WORKLOAD_NAME", "CLUSTER_ID", "OWNER"] {
        if let Some(text) = node[name].as_str().filter(|text| !text.is_empty()) {
            peer.insert(name.to_owned(), text.into());
        }
    }
    let mut labels = Map::new();
    for name in [
        "service.istio.io/canonical-name",
        "service.istio.io/canonical-revision",
        "app",
        "version",
    ] {
        if let Some(text) = node["LABELS"][name]
            .as_str()
            .filter(|text| !text.is_empty())
        {
            labels.insert(name.to_owned(), text.into());
        }
    }
    peer.insert("LABELS".to_owned(), Value::Object(labels));
    Value::Object(peer)
}

/// Keys are sorted, so the same workload always gives the same bytes.
pub(crate) fn to_struct(value: &Value) -> Struct {
    let fields = value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| {
            let kind = match value {
                Value::Object(_) => Kind::StructValue(to_struct(value)),
                other => Kind::StringValue(other.as_str().unwrap_or_default().to_owned()),
            };
            (name.clone(), ProtoValue { kind: Some(kind) })
        });
    Struct {
        fields: fields.collect::<BTreeMap<_, _>>(),
    }
}

pub(crate) fn from_struct(value: Struct) -> Value {
    let fields = value.fields.into_iter().filter_map(|(name, value)| {
        let value = match value.kind? {
            Kind::StringValue(text) => Value::String(text),
            Kind::StructValue(value) => from_struct(value),
            _ => return None,
        };
        Some((name, value))
    });
    Value::Object(fields.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_workload_survives_its_header() {
        let node = json!({
            "NAME": "a-1", "NAMESPACE": "ns", "WORKLOAD_NAME": "a", "ISTIO_VERSION": "1.30",
            "LABELS": {"app": "a", "other": "x", "service.istio.io/canonical-name": "a"},
        });
        let bytes = to_struct(&workload(&node)).encode_to_vec();
        assert_eq!(
            from_struct(Struct::decode(&*bytes).expect("it was just encoded")),
            json!({
                "NAME": "a-1", "NAMESPACE": "ns", "WORKLOAD_NAME": "a",
                "LABELS": {"app": "a", "service.istio.io/canonical-name": "a"},
            })
        );
    }
}
