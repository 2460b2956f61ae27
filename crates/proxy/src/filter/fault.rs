//! `envoy.filters.http.fault`: delays requests, and answers instead of the upstream.

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use super::{Filter, Interests, Step};
use crate::{
    http::{Exchange, Flags, LocalReply},
    plan::http_filter::{Fault, FaultAbortSource, FaultDelaySource, RouteFilterConfig},
    worker::Worker,
};

stats::group! {
    /// `http.<prefix>.fault.`
    struct FaultStats {
        counter delays_injected,
        counter aborts_injected,
        counter faults_overflow,
        gauge active_faults,
    }
}

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct FaultFilter {
    fault: Arc<Fault>,
    shared: Rc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stats: FaultStats,
    active: Cell<u32>,
}

/// A fault under way: counted until the request ends.
#[derive(Debug)]
pub(crate) struct ActiveFault(Rc<Shared>);

impl Drop for ActiveFault {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get() - 1);
        self.0.stats.active_faults().dec();
    }
}

impl FaultFilter {
    pub(super) fn new(fault: Arc<Fault>, prefix: &str, worker: &Worker) -> FaultFilter {
        let stats = FaultStats::new(worker.stats.scope(&format!("http.{prefix}.fault.")));
        FaultFilter {
            fault,
            shared: Rc::new(Shared {
                stats,
                active: Cell::new(0),
            }),
        }
    }

    fn fault<'f>(&'f self, config: Option<&'f RouteFilterConfig>) -> &'f Fault {
        match config {
            Some(RouteFilterConfig::Fault(fault)) => fault,
            _ => &self.fault,
        }
    }

    /// Takes a place among the active faults; `None` when there are as many as allowed.
    fn begin(&self, fault: &Fault) -> Option<ActiveFault> {
        if fault
            .max_active_faults
            .is_some_and(|limit| self.shared.active.get() >= limit)
        {
            self.shared.stats.faults_overflow().inc();
            return None;
        }
        self.shared.active.set(self.shared.active.get() + 1);
        self.shared.stats.active_faults().inc();
        Some(ActiveFault(self.shared.clone()))
    }

    fn abort(&self, fault: &Fault, exchange: &mut Exchange<'_>, worker: &Worker) -> Step {
        let Some(abort) = &fault.abort else {
            return Step::Continue;
        };
        let number =
            |name: &str| -> Option<u32> { exchange.request.get_str(name)?.trim().parse().ok() };
        let (mut status, mut grpc) = (None, None);
        match abort.source {
            FaultAbortSource::HttpStatus(code) => status = Some(code),
            FaultAbortSource::GrpcStatus(code) => grpc = Some(code),
            FaultAbortSource::Header => {
                status = number("x-envoy-fault-abort-request")
                    .filter(|code| (200..600).contains(code))
                    .map(|code| code as u16);
                grpc = number("x-envoy-fault-abort-grpc-request").filter(|code| *code <= 16);
            }
        }
        let mut percentage = abort.percentage;
        if matches!(abort.source, FaultAbortSource::Header)
            && let Some(asked) = number("x-envoy-fault-abort-request-percentage")
        {
            percentage.numerator = percentage.numerator.min(asked);
        }
        if status.is_none() && grpc.is_none() || !percentage.hits(worker.random.bits()) {
            return Step::Continue;
        }
        if exchange.filters.fault.is_none() {
            match self.begin(fault) {
                Some(active) => exchange.filters.fault = Some(active),
                None => return Step::Continue,
            }
        }
        self.shared.stats.aborts_injected().inc();
        // A gRPC status is for those who know one: Envoy answers others 200.
        let grpc = grpc.filter(|_| status.is_none());
        let status = status.unwrap_or(200);
        let mut reply = LocalReply::new(status, "", "fault_filter_abort")
            .body(abort.body.clone())
            .flag(Flags::FAULT_INJECTED);
        reply.grpc_status = grpc;
        Step::Reply(reply)
    }

    fn applies(&self, fault: &Fault, exchange: &Exchange<'_>) -> bool {
        if let Some(cluster) = &fault.upstream_cluster {
            let to = exchange.route.action().map(|action| &action.cluster);
            if !matches!(to, Some(crate::plan::route::ClusterSpecifier::Cluster(name)) if name == cluster)
            {
                return false;
            }
        }
        if !fault.downstream_nodes.is_empty() {
            let node = exchange.request.get_str("x-envoy-downstream-service-node");
            if !node.is_some_and(|node| fault.downstream_nodes.iter().any(|name| **name == *node)) {
                return false;
            }
        }
        fault
            .headers
            .iter()
            .all(|matcher| matcher.matches(exchange))
    }
}

impl Filter for FaultFilter {
    fn interests(&self) -> Interests {
        Interests::REQUEST
    }

    fn request(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        let fault = self.fault(config);
        if fault.delay.is_none() && fault.abort.is_none() || !self.applies(fault, exchange) {
            return Step::Continue;
        }
        if let Some(delay) = &fault.delay {
            let number =
                |name: &str| -> Option<u32> { exchange.request.get_str(name)?.trim().parse().ok() };
            let mut percentage = delay.percentage;
            let length = match delay.source {
                FaultDelaySource::Fixed(length) => Some(length),
                FaultDelaySource::Header => {
                    if let Some(asked) = number("x-envoy-fault-delay-request-percentage") {
                        percentage.numerator = percentage.numerator.min(asked);
                    }
                    number("x-envoy-fault-delay-request")
                        .map(|millis| Duration::from_millis(millis.into()))
                }
            };
            if let Some(length) = length
                && percentage.hits(worker.random.bits())
                && let Some(active) = self.begin(fault)
            {
                exchange.filters.fault = Some(active);
                exchange.flags.add(Flags::DELAY_INJECTED);
                self.shared.stats.delays_injected().inc();
                return Step::Wait(length);
            }
        }
        self.abort(fault, exchange, worker)
    }

    fn resumed(
        &self,
        exchange: &mut Exchange<'_>,
        config: Option<&RouteFilterConfig>,
        worker: &Worker,
    ) -> Step {
        self.abort(self.fault(config), exchange, worker)
    }
}
