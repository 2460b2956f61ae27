//! The control plane's end of an ADS stream.

mod request;
mod response;
mod service;
mod stream;

pub use request::{Names, Request};
pub use response::Response;
pub use service::{Handler, Incoming, Responses, Service};
pub use stream::{Event, Phase, Stream, TypeStatus};
