//! What is wrong in the user's files, for a log line and for `ps` and `analyze`.

use std::{fmt, path::Path, sync::Arc};

use crate::ObjectKey;

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The object is in force; something in it is not as the user may think.
    Warning,
    /// The object is not in force in the form that the file has.
    Error,
}

/// One problem and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// The file.
    pub file: Arc<Path>,
    /// 1-based line; 0 for the file as a whole.
    pub line: u32,
    /// The object, where its name could be read.
    pub object: Option<ObjectKey>,
    /// Path of the field from the object's root, or empty.
    pub field: String,
    /// What is wrong, and what to do about it.
    pub message: String,
}

impl fmt::Display for Problem {
    /// As in `mesh/reviews.yaml:12: VirtualService default/reviews: spec.http[0].timeout: …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if let Some(object) = &self.object {
            write!(f, ": {object}")?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}
