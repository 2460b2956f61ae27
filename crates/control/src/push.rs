//! From a change of objects to what each proxy must be sent: what a change affects, which resources a view of the mesh
//! holds, and when to push.

mod change;
mod debounce;
mod intern;
mod view;

pub use change::Change;
pub use debounce::{Debounce, Timing};
pub use intern::Interner;
pub(crate) use view::names_key;
pub use view::{Own, Push, Scope, View, Views};
