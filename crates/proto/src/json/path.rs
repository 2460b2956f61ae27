//! Where a reader stands, for its errors.

use super::JsonError;

/// Deeper nesting than any real configuration has; keeps hostile input from exhausting the stack.
const MAX_DEPTH: usize = 100;

/// From the root to here.
#[derive(Default)]
pub(super) struct Path(Vec<Segment>);

pub(super) enum Segment {
    /// Of a list.
    Index(usize),
    /// As written; quoted where it is the key of a map.
    Key(String, bool),
    /// Of a field.
    Name(&'static str),
}

impl Path {
    pub(super) const TOO_DEEP: &str = "nested deeper than 100 levels";

    /// Goes one level down; false where that is too deep.
    pub(super) fn push(&mut self, segment: Segment) -> bool {
        self.0.push(segment);
        self.0.len() <= MAX_DEPTH
    }

    pub(super) fn pop(&mut self) {
        self.0.pop();
    }

    /// What is wrong here.
    pub(super) fn error(&self, message: impl Into<String>) -> JsonError {
        let mut path = String::new();
        for segment in &self.0 {
            match segment {
                Segment::Index(i) => path.push_str(&format!("[{i}]")),
                Segment::Key(key, true) => path.push_str(&format!("[{key:?}]")),
                Segment::Key(name, false) => push_name(&mut path, name),
                Segment::Name(name) => push_name(&mut path, name),
            }
        }
        JsonError::Field {
            path,
            message: message.into(),
        }
    }
}

fn push_name(path: &mut String, name: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(name);
}
