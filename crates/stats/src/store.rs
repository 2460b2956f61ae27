//! The store: every stat of the process by its name.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Bound,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;

use crate::{
    handle::{Counter, Gauge, GaugeCell, Histogram, Scope, Text},
    histogram::{BOUNDS, Buckets, Distribution},
    tags::{TagRules, Tagged},
    text::Query,
};

/// Which stats exist at all (`stats_config.stats_matcher`): a name that it refuses is counted nowhere.
pub type Matcher = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// Upper bounds of histograms' buckets by name (`stats_config.histogram_bucket_settings`): the first that takes a name counts.
pub type BucketRules = Vec<(Matcher, Vec<f64>)>;

/// Every stat of the process. Clones are the same store.
#[derive(Clone, Default)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    metrics: Mutex<BTreeMap<Arc<str>, Arc<Metric>>>,
    rules: OnceLock<TagRules>,
    matcher: OnceLock<Matcher>,
    buckets: OnceLock<BucketRules>,
    threads: AtomicU32,
}

/// What kind of stat a name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
    /// A text.
    Text,
}

/// One stat at the time of a scrape.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Envoy's dotted name.
    pub name: Arc<str>,
    /// Whether it was ever touched.
    pub used: bool,
    /// Its value over all threads.
    pub value: Value,
    metric: Arc<Metric>,
}

/// The value of a stat.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Of a counter.
    Counter(u64),
    /// Of a gauge.
    Gauge(i64),
    /// Of a histogram.
    Histogram(Distribution),
    /// Of a text.
    Text(String),
}

#[derive(Debug)]
struct Metric {
    cells: Cells,
    /// Labels given at birth.
    own: Option<Tagged>,
    /// Labels taken out of the name, worked out at the first scrape that wants them.
    extracted: OnceLock<Tagged>,
}

/// The cells of a stat, each with the thread that writes it.
#[derive(Debug)]
enum Cells {
    Counter(Mutex<Vec<(u32, Arc<AtomicU64>)>>),
    Gauge(Mutex<Vec<(u32, Arc<GaugeCell>)>>),
    Histogram(Mutex<Vec<(u32, Arc<Buckets>)>>),
    Text(Arc<Mutex<String>>),
}

impl Store {
    /// A store with these rules for tags and this choice of stats.
    pub fn new(rules: TagRules, matcher: Option<Matcher>) -> Self {
        let store = Self::default();
        store.configure(rules, matcher);
        store
    }

    /// Sets the rules and the choice, for a store that had to exist before the bootstrap was read. Only the first call
    /// has an effect, and stats that exist already stay.
    pub fn configure(&self, rules: TagRules, matcher: Option<Matcher>) {
        // A second call changes nothing, as said.
        let _ = self.inner.rules.set(rules);
        if let Some(matcher) = matcher {
            let _ = self.inner.matcher.set(matcher);
        }
    }

    /// Sets the bounds of histograms, in rising order; only the first call has an effect.
    pub fn configure_buckets(&self, rules: BucketRules) {
        // A second call changes nothing, as said.
        let _ = self.inner.buckets.set(rules);
    }

    /// The upper bounds that a histogram is shown with.
    pub(crate) fn bounds(&self, name: &str) -> &[f64] {
        let rules = self.inner.buckets.get().map_or(&[][..], Vec::as_slice);
        let own = rules.iter().find(|(matcher, _)| matcher(name));
        own.map_or(&BOUNDS, |(_, bounds)| bounds)
    }

    /// The handle maker of the calling thread; each thread takes one.
    pub fn stats(&self) -> Stats {
        Stats {
            store: self.clone(),
            thread: self.inner.threads.fetch_add(1, Relaxed),
            local: std::marker::PhantomData,
        }
    }

    /// The stats that a query takes, by name.
    pub(crate) fn samples_of(&self, query: &Query) -> Vec<Sample> {
        // The lock is held for the copy of the list only: a worker may be waiting to add a stat.
        let metrics: Vec<_> = {
            let all = self.inner.metrics.lock();
            let kind = |metric: &Metric| metric.cells.kind();
            all.iter()
                .filter(|(_, metric)| query.kind.is_none_or(|wanted| wanted == kind(metric)))
                .map(|(name, metric)| (name.clone(), metric.clone()))
                .collect()
        };
        metrics
            .into_iter()
            .filter(|(name, metric)| query.wants(name, metric.cells.kind()))
            .filter_map(|(name, metric)| {
                let (used, value) = metric.value();
                (used || !query.used_only).then_some(Sample {
                    name,
                    used,
                    value,
                    metric,
                })
            })
            .collect()
    }

    /// Every stat, by name.
    pub fn samples(&self) -> Vec<Sample> {
        // The lock is held for the copy of the list only: a worker may be waiting to add a stat.
        let metrics: Vec<_> = self
            .inner
            .metrics
            .lock()
            .iter()
            .map(|(name, metric)| (name.clone(), metric.clone()))
            .collect();
        metrics
            .into_iter()
            .map(|(name, metric)| {
                let (used, value) = metric.value();
                Sample {
                    name,
                    used,
                    value,
                    metric,
                }
            })
            .collect()
    }

    /// The value of one stat.
    pub fn value(&self, name: &str) -> Option<Value> {
        let metric = self.inner.metrics.lock().get(name).cloned()?;
        Some(metric.value().1)
    }

    /// The value of a counter or a gauge; 0 while it does not exist.
    pub fn number(&self, name: &str) -> i64 {
        match self.value(name) {
            Some(Value::Counter(value)) => value.min(i64::MAX as u64) as i64,
            Some(Value::Gauge(value)) => value,
            _ => 0,
        }
    }

    /// Sets counters and histograms back to nothing (`/reset_counters`).
    pub fn reset_counters(&self) {
        for metric in self.inner.metrics.lock().values() {
            match &metric.cells {
                Cells::Counter(cells) => cells
                    .lock()
                    .iter()
                    .for_each(|(_, cell)| cell.store(0, Relaxed)),
                Cells::Histogram(cells) => cells.lock().iter().for_each(|(_, cell)| cell.reset()),
                Cells::Gauge(_) | Cells::Text(_) => {}
            }
        }
    }

    /// Forgets the stats below a prefix: what it named is gone. Handles that are still held count nowhere from now on.
    pub fn remove(&self, prefix: &str) {
        let mut metrics = self.inner.metrics.lock();
        let names: Vec<Arc<str>> = metrics
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(name, _)| name.starts_with(prefix))
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            metrics.remove(&name);
        }
    }

    pub(crate) fn tagged(&self, sample: &Sample) -> Tagged {
        let metric = &sample.metric;
        metric.own.clone().unwrap_or_else(|| {
            metric
                .extracted
                .get_or_init(|| self.rules().extract(&sample.name))
                .clone()
        })
    }

    fn rules(&self) -> &TagRules {
        self.inner.rules.get_or_init(TagRules::default)
    }

    fn metric(&self, name: &str, kind: Kind, own: impl FnOnce() -> Option<Tagged>) -> Arc<Metric> {
        let make = || {
            Arc::new(Metric {
                cells: match kind {
                    Kind::Counter => Cells::Counter(Mutex::default()),
                    Kind::Gauge => Cells::Gauge(Mutex::default()),
                    Kind::Histogram => Cells::Histogram(Mutex::default()),
                    Kind::Text => Cells::Text(Arc::default()),
                },
                own: own(),
                extracted: OnceLock::new(),
            })
        };
        if self
            .inner
            .matcher
            .get()
            .is_some_and(|matcher| !matcher(name))
        {
            return make();
        }
        let mut metrics = self.inner.metrics.lock();
        match metrics.get(name) {
            Some(metric) if metric.cells.kind() == kind => metric.clone(),
            // A name that has two kinds is a mistake in our own code; the first keeps the name.
            Some(_) => make(),
            None => metrics.entry(name.into()).or_insert_with(make).clone(),
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("stats", &self.inner.metrics.lock().len())
            .finish_non_exhaustive()
    }
}

impl Cells {
    fn kind(&self) -> Kind {
        match self {
            Self::Counter(_) => Kind::Counter,
            Self::Gauge(_) => Kind::Gauge,
            Self::Histogram(_) => Kind::Histogram,
            Self::Text(_) => Kind::Text,
        }
    }
}

impl Metric {
    fn value(&self) -> (bool, Value) {
        match &self.cells {
            Cells::Counter(cells) => {
                let sum = cells
                    .lock()
                    .iter()
                    .fold(0u64, |sum, (_, cell)| sum.wrapping_add(cell.load(Relaxed)));
                (sum != 0, Value::Counter(sum))
            }
            Cells::Gauge(cells) => {
                let cells = cells.lock();
                let sum = cells.iter().fold(0i64, |sum, (_, cell)| {
                    sum.wrapping_add(cell.value.load(Relaxed))
                });
                (
                    cells.iter().any(|(_, cell)| cell.used.load(Relaxed)),
                    Value::Gauge(sum),
                )
            }
            Cells::Histogram(cells) => {
                let mut total = Distribution::default();
                cells
                    .lock()
                    .iter()
                    .for_each(|(_, cell)| cell.add_to(&mut total));
                (total.count != 0, Value::Histogram(total))
            }
            Cells::Text(text) => {
                let text = text.lock().clone();
                (!text.is_empty(), Value::Text(text))
            }
        }
    }
}

/// One thread's way to its stats.
#[derive(Clone, Debug)]
pub struct Stats {
    store: Store,
    thread: u32,
    local: std::marker::PhantomData<*const ()>,
}

impl Stats {
    /// The store that this belongs to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// A prefix, with its final dot.
    pub fn scope(&self, prefix: &str) -> Scope {
        Scope::new(self.clone(), prefix)
    }

    /// The counter of this name.
    pub fn counter(&self, name: &str) -> Counter {
        self.make_counter(name, || None)
    }

    /// The gauge of this name.
    pub fn gauge(&self, name: &str) -> Gauge {
        self.make_gauge(name, || None)
    }

    /// The histogram of this name.
    pub fn histogram(&self, name: &str) -> Histogram {
        self.make_histogram(name, || None)
    }

    /// The text of this name.
    pub fn text(&self, name: &str) -> Text {
        match &self.store.metric(name, Kind::Text, || None).cells {
            Cells::Text(text) => Text(text.clone()),
            _ => Text(Arc::default()),
        }
    }

    /// A counter that is born with labels: `name` is the part that they share, such as
    /// `istiocustom.istio_requests_total`.
    pub fn tagged_counter(&self, name: &str, tags: &[(&str, &str)]) -> Counter {
        self.make_counter(&tagged_name(name, tags), || Some(Tagged::new(name, tags)))
    }

    /// A gauge that is born with labels.
    pub fn tagged_gauge(&self, name: &str, tags: &[(&str, &str)]) -> Gauge {
        self.make_gauge(&tagged_name(name, tags), || Some(Tagged::new(name, tags)))
    }

    /// A histogram that is born with labels.
    pub fn tagged_histogram(&self, name: &str, tags: &[(&str, &str)]) -> Histogram {
        self.make_histogram(&tagged_name(name, tags), || Some(Tagged::new(name, tags)))
    }

    fn make_counter(&self, name: &str, own: impl FnOnce() -> Option<Tagged>) -> Counter {
        match &self.store.metric(name, Kind::Counter, own).cells {
            Cells::Counter(cells) => Counter::new(self.cell(cells)),
            _ => Counter::new(Arc::default()),
        }
    }

    fn make_gauge(&self, name: &str, own: impl FnOnce() -> Option<Tagged>) -> Gauge {
        match &self.store.metric(name, Kind::Gauge, own).cells {
            Cells::Gauge(cells) => Gauge::new(self.cell(cells)),
            _ => Gauge::new(Arc::default()),
        }
    }

    fn make_histogram(&self, name: &str, own: impl FnOnce() -> Option<Tagged>) -> Histogram {
        match &self.store.metric(name, Kind::Histogram, own).cells {
            Cells::Histogram(cells) => Histogram::new(self.cell(cells)),
            _ => Histogram::new(Arc::default()),
        }
    }

    /// This thread's cell among those of a stat: the same for each handle of one thread.
    fn cell<T: Default>(&self, cells: &Mutex<Vec<(u32, Arc<T>)>>) -> Arc<T> {
        let mut cells = cells.lock();
        if let Some((_, cell)) = cells.iter().find(|(thread, _)| *thread == self.thread) {
            return cell.clone();
        }
        let cell = Arc::<T>::default();
        cells.push((self.thread, cell.clone()));
        cell
    }
}

fn tagged_name(name: &str, tags: &[(&str, &str)]) -> String {
    let length = name.len()
        + tags
            .iter()
            .map(|(tag, value)| tag.len() + value.len() + 2)
            .sum::<usize>();
    let mut full = String::with_capacity(length);
    full.push_str(name);
    for (tag, value) in tags {
        for part in [".", tag, ".", value] {
            full.push_str(part);
        }
    }
    full
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_add_up() {
        let store = Store::default();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let store = store.clone();
                std::thread::spawn(move || {
                    let stats = store.stats();
                    let (counter, gauge) = (
                        stats.counter("cluster.a.upstream_rq_total"),
                        stats.gauge("g"),
                    );
                    for _ in 0..10_000 {
                        counter.inc();
                    }
                    gauge.add(3);
                    gauge.dec();
                    stats.histogram("h").record(7);
                })
            })
            .collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().expect("the thread ends well"));
        assert_eq!(store.number("cluster.a.upstream_rq_total"), 40_000);
        assert_eq!(store.number("g"), 8);
        let Some(Value::Histogram(histogram)) = store.value("h") else {
            panic!("h is a histogram")
        };
        assert_eq!((histogram.count, histogram.sum), (4, 28));
        store.reset_counters();
        assert_eq!(
            (
                store.number("cluster.a.upstream_rq_total"),
                store.number("g")
            ),
            (0, 8)
        );
    }

    #[test]
    fn two_handles_of_a_thread_share_a_cell() {
        let stats = Store::default().stats();
        stats.counter("a").inc();
        stats.counter("a").inc();
        assert_eq!(stats.counter("a").value(), 2);
    }

    #[test]
    fn removal_takes_a_prefix_and_no_more() {
        let store = Store::default();
        let stats = store.stats();
        for name in ["cluster.a.x", "cluster.a.y", "cluster.ab.x", "listener.a.x"] {
            stats.counter(name).inc();
        }
        store.remove("cluster.a.");
        let names: Vec<_> = store
            .samples()
            .iter()
            .map(|sample| sample.name.to_string())
            .collect();
        assert_eq!(names, ["cluster.ab.x", "listener.a.x"]);
    }

    #[test]
    fn what_the_matcher_refuses_is_not_there() {
        let store = Store::new(
            TagRules::default(),
            Some(Arc::new(|name: &str| name.starts_with("server."))),
        );
        let stats = store.stats();
        stats.counter("cluster.a.x").inc();
        stats.gauge("server.live").set(1);
        assert_eq!(store.samples().len(), 1);
        assert_eq!(store.number("server.live"), 1);
    }
}
