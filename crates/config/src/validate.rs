//! Rules that an object must keep beyond its schema.

use crate::{AnyObject, Severity};

/// One broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Errors refuse the object, warnings do not.
    pub severity: Severity,
    /// Path of the field from the object's root (`spec.http[0].route`).
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// Checks an object by the rules of its kind.
pub fn object(_object: &AnyObject) -> Vec<Finding> {
    Vec::new()
}
