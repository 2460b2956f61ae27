//! Stats: counters, gauges and histograms with Envoy's names, and the forms in which they are shown.
//!
//! A [`Store`] holds every stat of the process. Each thread takes its own [`Stats`] from it and asks that for handles:
//! a handle owns a cell that only its thread writes, so counting is one load and one store without a locked
//! instruction, and a scrape adds the cells up. A stat exists from the moment its handle is asked for, so code asks
//! when something is counted first; [`group!`] makes a struct of handles that does so by itself.
//!
//! Names are Envoy's dotted ones. [`TagRules`] takes the variable parts out of a name (`cluster.NAME.`), which gives the
//! labels of the Prometheus form. Stats that are born with labels (Istio's) say them: [`Stats::tagged_counter`].

mod handle;
mod histogram;
mod prometheus;
mod store;
mod tags;
mod text;

pub use handle::{Counter, Gauge, Histogram, Part, Scope, Tally, Text};
pub use histogram::{Distribution, QUANTILES};
pub use store::{BucketRules, Kind, Matcher, Sample, Stats, Store, Value};
pub use tags::{TagError, TagRules};
pub use text::{HistogramView, Query};

#[doc(hidden)]
pub mod __private {
    pub use crate::handle::Lazy;
}
