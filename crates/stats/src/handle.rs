//! Handles: what the code that counts holds.

use std::{
    cell::{Cell, OnceCell},
    marker::PhantomData,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;

use crate::{histogram::Buckets, store::Stats};

/// Keeps a handle on its thread: two writers of one cell would lose counts.
type Local = PhantomData<*const ()>;

/// A number that only grows (until `/reset_counters`).
#[derive(Clone, Debug)]
pub struct Counter {
    cell: Arc<AtomicU64>,
    local: Local,
}

impl Counter {
    pub(crate) fn new(cell: Arc<AtomicU64>) -> Self {
        Self {
            cell,
            local: PhantomData,
        }
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        // One writer: a plain load and store cannot lose anything but a concurrent reset.
        self.cell
            .store(self.cell.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// What this thread has counted.
    pub fn value(&self) -> u64 {
        self.cell.load(Relaxed)
    }

    /// A handle for inside of something that can be sent. It has to be used on this thread: on another one counts
    /// would be lost.
    pub fn tally(&self) -> Tally {
        Tally(self.cell.clone())
    }
}

/// A [`Counter`] that does not keep what it lies in on its thread.
#[derive(Debug)]
pub struct Tally(Arc<AtomicU64>);

impl Tally {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }
}

#[derive(Debug, Default)]
pub(crate) struct GaugeCell {
    pub(crate) value: AtomicI64,
    pub(crate) used: AtomicBool,
}

/// A number that goes up and down. The stat is the sum over all threads.
#[derive(Clone, Debug)]
pub struct Gauge {
    cell: Arc<GaugeCell>,
    local: Local,
}

impl Gauge {
    pub(crate) fn new(cell: Arc<GaugeCell>) -> Self {
        Self {
            cell,
            local: PhantomData,
        }
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one away.
    pub fn dec(&self) {
        self.add(-1);
    }

    /// Adds `n`, which may be negative.
    pub fn add(&self, n: i64) {
        self.set(self.cell.value.load(Relaxed).wrapping_add(n));
    }

    /// Sets this thread's share of the sum.
    pub fn set(&self, value: i64) {
        self.cell.value.store(value, Relaxed);
        self.cell.used.store(true, Relaxed);
    }

    /// This thread's share of the sum.
    pub fn value(&self) -> i64 {
        self.cell.value.load(Relaxed)
    }

    /// A part of it for inside of something that can be sent. It has to be used on this thread, as a [`Tally`] has.
    pub fn part(&self) -> Part {
        Part {
            cell: self.cell.clone(),
            value: Cell::new(0),
        }
    }
}

/// What one holder adds to a [`Gauge`]; taken away again when it is dropped.
#[derive(Debug)]
pub struct Part {
    cell: Arc<GaugeCell>,
    value: Cell<i64>,
}

impl Part {
    /// Replaces what the holder adds.
    pub fn set(&self, value: i64) {
        let before = self.value.replace(value);
        if value != before {
            let sum = self.cell.value.load(Relaxed);
            let sum = sum.wrapping_add(value.wrapping_sub(before));
            self.cell.value.store(sum, Relaxed);
            self.cell.used.store(true, Relaxed);
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// A distribution of whole numbers: milliseconds or bytes, as the name says.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: Arc<Buckets>,
    local: Local,
}

impl Histogram {
    pub(crate) fn new(buckets: Arc<Buckets>) -> Self {
        Self {
            buckets,
            local: PhantomData,
        }
    }

    /// Records one value.
    pub fn record(&self, value: u64) {
        self.buckets.record(value);
    }
}

/// A stat whose value is a text, such as a version.
#[derive(Clone, Debug)]
pub struct Text(pub(crate) Arc<Mutex<String>>);

impl Text {
    /// Replaces the text.
    pub fn set(&self, text: &str) {
        *self.0.lock() = text.to_owned();
    }
}

/// A prefix of names, such as `cluster.NAME.`, on one thread.
#[derive(Clone, Debug)]
pub struct Scope {
    stats: Stats,
    prefix: Rc<str>,
}

impl Scope {
    pub(crate) fn new(stats: Stats, prefix: &str) -> Self {
        Self {
            stats,
            prefix: prefix.into(),
        }
    }

    /// The prefix, with its final dot.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The thread's stats.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// A longer prefix: `name` is appended as it stands, so it ends in a dot.
    pub fn scope(&self, name: &str) -> Self {
        Self::new(self.stats.clone(), &self.name(name))
    }

    /// The counter of this name below the prefix.
    pub fn counter(&self, name: &str) -> Counter {
        self.stats.counter(&self.name(name))
    }

    /// The gauge of this name below the prefix.
    pub fn gauge(&self, name: &str) -> Gauge {
        self.stats.gauge(&self.name(name))
    }

    /// The histogram of this name below the prefix.
    pub fn histogram(&self, name: &str) -> Histogram {
        self.stats.histogram(&self.name(name))
    }

    fn name(&self, name: &str) -> String {
        [&*self.prefix, name].concat()
    }
}

/// A handle that comes into being at its first use.
#[derive(Clone, Debug)]
pub struct Lazy<T>(OnceCell<T>);

impl<T> Default for Lazy<T> {
    fn default() -> Self {
        Self(OnceCell::new())
    }
}

impl<T> Lazy<T> {
    /// The handle, made by `make` where nobody has asked before.
    pub fn or_make(&self, make: impl FnOnce() -> T) -> &T {
        self.0.get_or_init(make)
    }
}

/// Declares a struct of stats below one prefix; each stat exists from its first use.
///
/// ```
/// use outrigger_stats as stats;
/// stats::group! {
///     /// What a listener counts.
///     pub struct ListenerStats {
///         counter downstream_cx_total,
///         gauge downstream_cx_active,
///         histogram downstream_cx_length_ms,
///     }
/// }
/// let stats = stats::Store::default().stats();
/// let listener = ListenerStats::new(stats.scope("listener.0.0.0.0_80."));
/// listener.downstream_cx_total().inc();
/// ```
#[macro_export]
macro_rules! group {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($kind:ident $field:ident),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        $vis struct $name {
            scope: $crate::Scope,
            $($field: $crate::__private::Lazy<$crate::__kind!($kind)>,)*
        }

        #[allow(dead_code)]
        impl $name {
            /// The stats below this prefix; none exists yet.
            $vis fn new(scope: $crate::Scope) -> Self {
                Self { scope, $($field: ::std::default::Default::default(),)* }
            }

            /// The prefix.
            $vis fn scope(&self) -> &$crate::Scope {
                &self.scope
            }

            $(
                #[doc = concat!("The ", stringify!($kind), " `", stringify!($field), "`.")]
                $vis fn $field(&self) -> &$crate::__kind!($kind) {
                    self.$field.or_make(|| self.scope.$kind(stringify!($field)))
                }
            )*
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __kind {
    (counter) => {
        $crate::Counter
    };
    (gauge) => {
        $crate::Gauge
    };
    (histogram) => {
        $crate::Histogram
    };
}
