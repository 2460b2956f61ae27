//! What tests need of a machine.
//!
//! Tests of `outrigger-intercept` and `outrigger-cni` take this file by its path.

use std::process::{Command, ExitCode, Stdio};

/// Root and programs; else what tests of `what` lack.
pub fn root_and(what: &str, programs: &[&str]) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err(format!("{what} tests need root"));
    }
    for program in programs {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {program}")])
            .stdout(Stdio::null())
            .status()
            .is_ok_and(|s| s.success());
        if !found {
            return Err(format!("{what} tests need {program}"));
        }
    }
    Ok(())
}

/// How a test program ends that cannot run: well, but with `CI` set everything must be there.
pub fn skipped(why: &str) -> ExitCode {
    println!("skipped: {why}");
    match std::env::var_os("CI") {
        Some(_) => ExitCode::FAILURE,
        None => ExitCode::SUCCESS,
    }
}
