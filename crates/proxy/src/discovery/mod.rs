//! Configuration from a control plane: resources in, plans out, changes to the server, an answer to each response.
//!
//! [`Truth`] is the state machine, without I/O: what is active, what is warming, what was refused, and the bytes of
//! each as they came (for `/config_dump`). [`Discovery`] connects it to an ADS stream and to the [`crate::server::Server`].
//!
//! Warming, as in Envoy: a cluster with EDS becomes visible when its endpoints were answered, a listener with RDS when
//! its routes were; the former version serves until then. A resource that is wrong is refused by itself; the others of
//! its response are taken.

mod entries;
mod secrets;
mod stream;
mod truth;

pub use entries::{Config, Entry, ErrorState, Version};
pub use stream::Discovery;
pub(crate) use stream::complete;
pub use truth::{Apply, Failure, Phase, Truth};

#[cfg(test)]
mod tests;

#[cfg(test)]
mod live_tests;
