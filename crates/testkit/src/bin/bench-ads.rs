//! The control plane of a comparison: many EDS clusters with a virtual host each, and one change of endpoints for each
//! line on standard input.
//!
//!     bench-ads LISTEN ORIGIN LISTENER COUNT
//!
//! Everything without a virtual host of its own goes to ORIGIN; the proxy is told to listen on LISTENER.

use std::{io::BufRead, net::SocketAddr, sync::Arc};

use anyhow::Context;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};
use xds::{
    Mode, Resource, ResourceSet,
    server::{Event, Handler, Incoming, Phase, Response, Responses, Service, Stream},
    type_url::{CDS, EDS, LDS},
};

/// What every proxy gets, of each type.
#[derive(Clone, Debug)]
struct Sets {
    clusters: Arc<ResourceSet>,
    endpoints: Arc<ResourceSet>,
    listeners: Arc<ResourceSet>,
}

impl Sets {
    fn of(&self, type_url: &str) -> Option<&Arc<ResourceSet>> {
        match type_url {
            CDS => Some(&self.clusters),
            EDS => Some(&self.endpoints),
            LDS => Some(&self.listeners),
            _ => None,
        }
    }
}

struct Ads(watch::Receiver<Sets>);

impl Handler for Ads {
    async fn open(
        &self,
        mode: Mode,
        request: tonic::Request<Incoming>,
    ) -> Result<Responses, tonic::Status> {
        let (send, responses) = mpsc::unbounded_channel();
        tokio::spawn(serve(mode, request.into_inner(), self.0.clone(), send));
        Ok(Box::pin(UnboundedReceiverStream::new(responses).map(Ok)))
    }
}

async fn serve(
    mode: Mode,
    mut requests: Incoming,
    mut sets: watch::Receiver<Sets>,
    send: mpsc::UnboundedSender<Response>,
) {
    let mut stream = Stream::new(mode);
    loop {
        let wanted = tokio::select! {
            request = requests.next() => match request {
                Some(Ok(request)) => match stream.request(&request) {
                    Event::Respond { type_url, .. } => type_url,
                    Event::Nack { type_url, message, .. } => {
                        eprintln!("{type_url} refused: {message}");
                        continue;
                    }
                    _ => continue,
                },
                _ => return,
            },
            changed = sets.changed() => match changed {
                Ok(()) => EDS.into(),
                Err(_) => return,
            },
        };
        let sets = sets.borrow_and_update().clone();
        let Some(set) = sets.of(&wanted) else {
            continue;
        };
        if let Some(response) = stream.update(&wanted, set, "bench", Phase::All)
            && send.send(response).is_err()
        {
            return;
        }
    }
}

fn resource(type_url: &str, name: &str, message: &Value) -> anyhow::Result<Arc<Resource>> {
    let full_name = proto::any::type_name(type_url);
    let encoded = proto::json::value_to_encoded(full_name, message)?;
    Ok(Arc::new(Resource::new(name, type_url, &encoded)))
}

fn name(index: usize) -> String {
    format!("filler-{index}")
}

fn cluster(name: &str) -> anyhow::Result<Arc<Resource>> {
    let message = json!({
        "name": name, "type": "EDS", "connectTimeout": "1s",
        "edsClusterConfig": { "edsConfig": { "ads": {}, "resourceApiVersion": "V3" } },
    });
    resource(CDS, name, &message)
}

fn endpoints(name: &str, addresses: &[SocketAddr]) -> anyhow::Result<Arc<Resource>> {
    let endpoint = |a: &SocketAddr| {
        let socket = json!({ "address": a.ip().to_string(), "portValue": a.port() });
        json!({ "endpoint": { "address": { "socketAddress": socket } } })
    };
    let endpoints: Vec<Value> = addresses.iter().map(endpoint).collect();
    let message = json!({ "clusterName": name, "endpoints": [{ "lbEndpoints": endpoints }] });
    resource(EDS, name, &message)
}

/// Three endpoints, one of which depends on the round.
fn filler(index: usize, round: usize) -> anyhow::Result<Arc<Resource>> {
    let third = 11 + (round % 1000) as u16;
    let addresses = [9, 10, third].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    endpoints(&name(index), &addresses)
}

fn listener(address: SocketAddr, count: usize) -> anyhow::Result<Arc<Resource>> {
    let mut hosts: Vec<Value> = (0..count)
        .map(|i| {
            let route = json!({ "match": { "prefix": "/" }, "route": { "cluster": name(i) } });
            json!({ "name": format!("h{i}"), "domains": [format!("h{i}.example")], "routes": [route] })
        })
        .collect();
    let route = json!({ "match": { "prefix": "/" }, "route": { "cluster": "origin" } });
    hosts.push(json!({ "name": "all", "domains": ["*"], "routes": [route] }));
    let kind = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let manager = json!({
        "@type": kind, "statPrefix": "bench", "routeConfig": { "name": "r", "virtualHosts": hosts },
        "httpFilters": [{ "name": "envoy.filters.http.router", "typedConfig": { "@type": router } }],
    });
    let filter =
        json!({ "name": "envoy.filters.network.http_connection_manager", "typedConfig": manager });
    let socket = json!({ "address": address.ip().to_string(), "portValue": address.port() });
    let message = json!({
        "name": "bench", "address": { "socketAddress": socket },
        "filterChains": [{ "filters": [filter] }],
    });
    resource(LDS, "bench", &message)
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [listen, origin, proxy, count] = &args[..] else {
        anyhow::bail!("usage: bench-ads LISTEN ORIGIN LISTENER COUNT");
    };
    let listen: SocketAddr = listen.parse().context("LISTEN is not IP:PORT")?;
    let origin: SocketAddr = origin.parse().context("ORIGIN is not IP:PORT")?;
    let proxy: SocketAddr = proxy.parse().context("LISTENER is not IP:PORT")?;
    let count: usize = count.parse().context("COUNT is not a number")?;

    let clusters: anyhow::Result<Vec<_>> = (0..count).map(|i| cluster(&name(i))).collect();
    let mut clusters = clusters?;
    clusters.push(cluster("origin")?);
    let all: anyhow::Result<Vec<_>> = (0..count).map(|i| filler(i, 0)).collect();
    let mut all = all?;
    all.push(endpoints("origin", &[origin])?);
    let (change, sets) = watch::channel(Sets {
        clusters: Arc::new(ResourceSet::new(clusters)),
        endpoints: Arc::new(ResourceSet::new(all)),
        listeners: Arc::new(ResourceSet::new(vec![listener(proxy, count)?])),
    });
    std::thread::spawn(move || {
        for (round, line) in std::io::stdin().lock().lines().enumerate() {
            // A prime step meets every cluster in turn.
            let changed = filler(round * 7919 % count, round + 1);
            let (Ok(_), Ok(changed)) = (line, changed) else {
                return;
            };
            change.send_modify(|sets| {
                let others = sets.endpoints.iter().filter(|r| r.name() != changed.name());
                let mut new: Vec<_> = others.cloned().collect();
                new.push(changed);
                sets.endpoints = Arc::new(ResourceSet::new(new));
            });
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async move {
        let service = Service::new(Arc::new(Ads(sets)));
        tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .add_service(service)
            .serve(listen)
            .await
            .context("cannot serve")
    })
}
