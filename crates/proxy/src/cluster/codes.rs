//! Responses of a cluster by their status, in Envoy's names.

use std::cell::RefCell;

use ::stats::Counter;

use super::Cluster;

/// Counters of single statuses, as they come up.
#[derive(Debug, Default)]
pub(super) struct Codes(RefCell<Vec<Code>>);

#[derive(Debug)]
struct Code {
    status: u16,
    internal: bool,
    counters: [Counter; 4],
}

impl Cluster {
    /// Counts the response that a client gets for its request, also one that was made here since no host gave one:
    /// `upstream_rq_completed`, `upstream_rq_2xx` and `upstream_rq_200`, and the same below `internal.` or `external.`, by
    /// where the client is. Requests of the proxy itself are internal.
    pub fn count_response(&self, status: u16, internal: bool) {
        self.stats.response(status);
        let mut codes = self.codes.0.borrow_mut();
        let known = codes
            .iter()
            .position(|code| (code.status, code.internal) == (status, internal));
        let at = known.unwrap_or_else(|| {
            let origin = if internal { "internal" } else { "external" };
            let class = status / 100;
            let names = [
                format!("upstream_rq_{status}"),
                format!("{origin}.upstream_rq_{status}"),
                format!("{origin}.upstream_rq_{class}xx"),
                format!("{origin}.upstream_rq_completed"),
            ];
            codes.push(Code {
                status,
                internal,
                counters: names.map(|name| self.stats.scope().counter(&name)),
            });
            codes.len() - 1
        });
        codes[at].counters.iter().for_each(Counter::inc);
    }

    /// Counts a response whose request is sent again: below `retry.`, and nowhere else.
    pub fn count_repeated(&self, status: u16) {
        let class = status / 100;
        for name in [
            format!("retry.upstream_rq_{status}"),
            format!("retry.upstream_rq_{class}xx"),
            "retry.upstream_rq_completed".to_owned(),
        ] {
            self.stats.scope().counter(&name).inc();
        }
    }
}
