//! What is wrong in a message, each mistake with the path of its field.
//!
//! A conversion goes on after a mistake and collects all of them, so that a user mends a file once. [`At`] is the
//! place in the message that a conversion stands at; it reports to the collector of the whole message.

use std::{cell::RefCell, fmt};

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", if path.is_empty() { String::new() } else { format!("{path}: ") })]
pub struct PlanError {
    /// Path from the root of the resource, e.g. `filter_chains[0].filters[1].typed_config.stat_prefix`.
    pub path: String,
    /// What is wrong and what to write instead.
    pub message: String,
}

/// All mistakes of one resource; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanErrors(pub Vec<PlanError>);

impl fmt::Display for PlanErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for PlanErrors {}

/// Marks that a mistake was reported and that there is nothing to go on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reported;

/// The result of one step of a conversion.
pub(crate) type Step<T> = Result<T, Reported>;

/// The place in a message that a conversion stands at.
#[derive(Clone, Copy)]
pub(crate) struct At<'a> {
    errors: &'a Collector,
    parent: Option<&'a At<'a>>,
    segment: Segment<'a>,
}

#[derive(Clone, Copy)]
enum Segment<'a> {
    Root,
    Field(&'a str),
    Index(usize),
    Key(&'a str),
}

impl<'a> At<'a> {
    /// The root of a message.
    fn root(errors: &'a Collector) -> Self {
        Self {
            errors,
            parent: None,
            segment: Segment::Root,
        }
    }

    /// A field of the message here.
    pub(crate) fn field<'b>(&'b self, name: &'b str) -> At<'b> {
        At {
            errors: self.errors,
            parent: Some(self),
            segment: Segment::Field(name),
        }
    }

    /// An element of the list here.
    pub(crate) fn index<'b>(&'b self, index: usize) -> At<'b> {
        At {
            errors: self.errors,
            parent: Some(self),
            segment: Segment::Index(index),
        }
    }

    /// An entry of the map here.
    pub(crate) fn key<'b>(&'b self, key: &'b str) -> At<'b> {
        At {
            errors: self.errors,
            parent: Some(self),
            segment: Segment::Key(key),
        }
    }

    /// Reports a mistake here.
    pub(crate) fn error(&self, message: impl Into<String>) -> Reported {
        let mut mistakes = self.errors.mistakes.borrow_mut();
        if mistakes.len() < MOST {
            mistakes.push(PlanError {
                path: self.path(),
                message: message.into(),
            });
        } else if mistakes.len() == MOST {
            mistakes.push(PlanError {
                path: String::new(),
                message: "and more mistakes of this kind or others".to_owned(),
            });
        }
        Reported
    }

    /// Reports something legal that nothing here implements.
    pub(crate) fn not_implemented(&self, message: impl Into<String>) -> Reported {
        if !self.errors.lenient {
            return self.error(message);
        }
        self.errors.left_out.borrow_mut().push(PlanError {
            path: self.path(),
            message: message.into(),
        });
        Reported
    }

    /// Converts the elements of a list, going on after those that are wrong.
    pub(crate) fn each<M, T>(
        &self,
        name: &str,
        messages: &[M],
        mut convert: impl FnMut(At<'_>, &M) -> Step<T>,
    ) -> Vec<T> {
        let at = self.field(name);
        let element = |(i, m)| convert(at.index(i), m).ok();
        messages.iter().enumerate().filter_map(element).collect()
    }

    /// Converts a field that may be absent.
    pub(crate) fn optional<M, T>(
        &self,
        name: &str,
        message: &Option<M>,
        convert: impl FnOnce(At<'_>, &M) -> Step<T>,
    ) -> Step<Option<T>> {
        message
            .as_ref()
            .map(|m| convert(self.field(name), m))
            .transpose()
    }

    /// Converts a field that must be there.
    pub(crate) fn required<M, T>(
        &self,
        name: &str,
        message: &Option<M>,
        convert: impl FnOnce(At<'_>, &M) -> Step<T>,
    ) -> Step<T> {
        match message {
            Some(m) => convert(self.field(name), m),
            None => Err(self.field(name).error("is required")),
        }
    }

    /// A text that must not be empty.
    pub(crate) fn text(&self, name: &str, text: &str) -> Step<std::sync::Arc<str>> {
        if text.is_empty() {
            return Err(self.field(name).error("is required and must not be empty"));
        }
        Ok(text.into())
    }

    fn path(&self) -> String {
        let mut path = self.parent.map_or_else(String::new, At::path);
        match self.segment {
            Segment::Root => {}
            Segment::Field(name) => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(name);
            }
            Segment::Index(index) => path.push_str(&format!("[{index}]")),
            Segment::Key(key) => path.push_str(&format!("[{key:?}]")),
        }
        path
    }
}

/// How many mistakes of one resource are told: there may be a million endpoints, each with one.
const MOST: usize = 100;

/// What a conversion reports to.
#[derive(Default)]
struct Collector {
    mistakes: RefCell<Vec<PlanError>>,
    left_out: RefCell<Vec<PlanError>>,
    lenient: bool,
}

/// Runs a conversion from the root and gives its plan, or all mistakes.
pub(crate) fn collect<T>(convert: impl FnOnce(At<'_>) -> Step<T>) -> Result<T, PlanErrors> {
    run(Collector::default(), convert).map(|(plan, _)| plan)
}

/// Like [`collect`], but what is only not implemented is left out of the plan and listed. Such a plan explains; it
/// must never serve.
pub(crate) fn collect_lenient<T>(
    convert: impl FnOnce(At<'_>) -> Step<T>,
) -> Result<(T, Vec<PlanError>), PlanErrors> {
    run(
        Collector {
            lenient: true,
            ..Collector::default()
        },
        convert,
    )
}

fn run<T>(
    collector: Collector,
    convert: impl FnOnce(At<'_>) -> Step<T>,
) -> Result<(T, Vec<PlanError>), PlanErrors> {
    let result = convert(At::root(&collector));
    let mut mistakes = collector.mistakes.into_inner();
    let left_out = collector.left_out.into_inner();
    match result {
        Ok(plan) if mistakes.is_empty() => Ok((plan, left_out)),
        _ => {
            if mistakes.is_empty() {
                mistakes = left_out;
            }
            Err(PlanErrors(mistakes))
        }
    }
}

/// Whether a field of a message says anything.
pub(crate) trait IsSet {
    /// False for the value that an absent field has.
    fn is_set(&self) -> bool;
}

impl<T> IsSet for Option<T> {
    fn is_set(&self) -> bool {
        self.is_some()
    }
}

impl<T> IsSet for Vec<T> {
    fn is_set(&self) -> bool {
        !self.is_empty()
    }
}

impl<K, V> IsSet for std::collections::BTreeMap<K, V> {
    fn is_set(&self) -> bool {
        !self.is_empty()
    }
}

macro_rules! set_when_not_default {
    ($($t:ty),*) => {$(
        impl IsSet for $t {
            fn is_set(&self) -> bool {
                *self != <$t>::default()
            }
        }
    )*};
}

set_when_not_default!(bool, i32, u32, i64, u64, f64, String);

/// Rejects each of the named fields that is set: it would change behaviour, and nothing here implements it.
macro_rules! unsupported {
    ($at:expr, $($field:ident),+ $(,)?) => {$(
        if $crate::plan::error::IsSet::is_set($field) {
            let name = stringify!($field);
            $at.field(name.strip_prefix("r#").unwrap_or(name))
                .not_implemented("is not implemented; remove it");
        }
    )+};
}

pub(crate) use unsupported;
