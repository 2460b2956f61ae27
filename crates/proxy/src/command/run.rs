//! From arguments to a running proxy.

use std::process::ExitCode;

use super::Arguments;

/// Runs to the end of the process.
pub(super) fn run(arguments: &Arguments, command_line: Vec<String>) -> ExitCode {
    let _ = (arguments, command_line);
    ExitCode::FAILURE
}
