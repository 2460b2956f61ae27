//! What every room needs and none owns.

pub mod backoff;
pub mod cidr;
pub mod clock;
pub mod file;
pub mod log;
pub mod memory;
pub mod spiffe;
