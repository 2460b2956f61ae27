//! The proxy's end of an ADS stream.

mod connect;
mod session;

pub use connect::{
    ConnectError, Connection, Incoming, MAX_RESPONSE, Service, Target, connect, connect_to,
};
pub use session::{Outgoing, Received, ReceivedResource, Session, Want, shown};
