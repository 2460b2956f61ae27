//! What every room needs and none owns.

pub mod backoff;
pub mod log;
