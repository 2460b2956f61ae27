//! Copies of requests to other clusters: sent when the request is complete, their answers thrown
//! away.

use std::{future::poll_fn, rc::Rc, time::Duration};

use outrigger_http::RequestHead;

use super::{
    Exchange,
    pump::Kept,
    upstream::{self, Upstream},
};
use crate::{
    cluster::LbContext,
    plan::route::{ClusterSpecifier, Mirror},
    router,
    worker::Worker,
};

/// The copies that this request gets.
pub(super) fn chosen(exchange: &Exchange<'_>, worker: &Worker) -> Vec<Mirror> {
    let Some((virtual_host, _)) = exchange.route.get() else {
        return Vec::new();
    };
    let own = exchange
        .route
        .action()
        .map(|action| &action.mirrors)
        .filter(|m| !m.is_empty());
    let mirrors = own
        .or(Some(&virtual_host.mirrors).filter(|mirrors| !mirrors.is_empty()))
        .or_else(|| exchange.route.configuration().map(|routes| &routes.mirrors));
    mirrors
        .into_iter()
        .flatten()
        .filter(|mirror| mirror.fraction.hits(worker.random.bits()))
        .cloned()
        .collect()
}

/// Sends the copies in the background.
pub(super) fn send(
    mirrors: Vec<Mirror>,
    kept: &Kept,
    exchange: &Exchange<'_>,
    worker: &Rc<Worker>,
) {
    for mirror in mirrors {
        let name = match &mirror.cluster {
            ClusterSpecifier::Cluster(name) => Some(&**name),
            ClusterSpecifier::Header(header) => exchange.request.get_str(header),
            ClusterSpecifier::Weighted(_) => None,
        };
        let Some(cluster) = name.and_then(|name| worker.clusters.find(name)) else {
            continue;
        };
        if !kept.complete || !kept.is_whole() {
            // Too large to be kept, or never complete.
            cluster.stats().retry_or_shadow_abandoned().inc();
            continue;
        }
        let mut head: RequestHead = exchange.request.clone();
        let host = match &mirror.host_rewrite {
            Some(host) => Some(host.to_string()),
            None if mirror.disable_host_suffix => None,
            None => {
                let (host, port) = super::split_port(head.authority());
                Some(match port {
                    Some(port) => format!("{host}-shadow:{port}"),
                    None => format!("{host}-shadow"),
                })
            }
        };
        if let Some(host) = host {
            head.set_authority(&host);
        }
        router::headers::mutate_copy(&mirror.header_mutations, exchange, &mut head.headers);
        let (pieces, trailers) = (kept.pieces.clone(), kept.trailers.clone());
        let original_dst = exchange.connection.original_dst();
        let version = head.version;
        tokio::task::spawn_local(async move {
            let copy = async {
                let context = LbContext {
                    original_dst,
                    auto_name: upstream::auto_name(&cluster.plan, &head),
                    ..LbContext::default()
                };
                let host = cluster.choose(&context).ok()?;
                let mut upstream = Upstream::acquire(&cluster, &host, &context, version)
                    .await
                    .ok()?;
                upstream.send_head(&head, head.framing).ok()?;
                for piece in pieces {
                    poll_fn(|cx| upstream.poll_ready(cx)).await.ok()?;
                    upstream.send_data(piece).ok()?;
                }
                poll_fn(|cx| upstream.poll_ready(cx)).await.ok()?;
                upstream.send_end(trailers.as_ref()).ok()?;
                poll_fn(|cx| upstream.poll_flush(cx)).await.ok()?;
                while poll_fn(|cx| upstream.poll_head(cx, false))
                    .await
                    .ok()?
                    .is_informational()
                {}
                while poll_fn(|cx| upstream.poll_frame(cx))
                    .await
                    .transpose()
                    .ok()?
                    .is_some()
                {}
                upstream.release();
                Some(())
            };
            if tokio::time::timeout(LONGEST, copy).await.is_err() {
                cluster.stats().upstream_rq_timeout().inc();
            }
        });
    }
}

/// A copy is given up after this time, whatever its route says: nobody waits for it.
const LONGEST: Duration = Duration::from_secs(60);
