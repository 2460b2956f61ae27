//! Header operations of routes: what is set, appended and removed.

use std::sync::Arc;

use super::format::Template;

/// Operations on one header block, in Envoy's order: removals, then what replaces a header, then what comes beside one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderMutations {
    /// In order.
    pub add: Vec<HeaderAdd>,
    /// Lower-case names.
    pub remove: Vec<Arc<str>>,
}

impl HeaderMutations {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }
}

/// One `HeaderValueOption`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderAdd {
    /// Lower case; `:path` and `host`/`:authority` are never here (the plan rejects them).
    pub name: Arc<str>,
    /// May hold `%OPERATORS%`.
    pub value: Template,
    /// How it meets a header that is there.
    pub action: AppendAction,
    /// Adds the header even when the value turns out empty.
    pub keep_empty_value: bool,
}

/// How a new value meets a header that is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AppendAction {
    /// A further field.
    #[default]
    AppendIfExistsOrAdd,
    /// Only where there is none.
    AddIfAbsent,
    /// In place of all there are.
    OverwriteIfExistsOrAdd,
    /// In place of all there are, and only then.
    OverwriteIfExists,
}

/// `envoy.config.common.mutation_rules.v3.HeaderMutation`: unlike [`HeaderMutations`] in one order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderMutation {
    /// Takes a header off (lower case).
    Remove(Arc<str>),
    /// Adds, appends or sets one.
    Append(HeaderAdd),
    /// Takes off the headers whose names match.
    RemoveOnMatch(super::matcher::StringMatcher),
}
