//! The command line of this room.

use std::{ffi::OsString, process::ExitCode};

/// Runs the command; `args[0]` is its own name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let _ = args;
    eprintln!("not built in yet");
    ExitCode::FAILURE
}
