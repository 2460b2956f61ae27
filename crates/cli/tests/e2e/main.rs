//! The mesh as its users meet it: real pods, real interception, our control plane and proxies; one start for all cases.
//!
//! Needs root, `ip`, `iptables` and `wrk`. The program under test is `$OUTRIGGER_BIN`, else the one that cargo built beside
//! this test. `cargo test -p outrigger-cli --test e2e -- NAME` runs the cases whose name holds NAME.

mod capture;
mod cases;
mod gateway_api;
mod load;
mod mesh;
mod mtls;
mod policy;
mod wrk;

use std::{env, panic, process::ExitCode, time::Instant};

fn main() -> ExitCode {
    let filter: Vec<String> = env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    if env::args().any(|a| a == "--list") {
        cases::CASES
            .iter()
            .for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Some(reason) = mesh::cannot_run() {
        println!("skipped: {reason}");
        return if env::var_os("CI").is_some() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        };
    }
    let begun = Instant::now();
    let mesh = mesh::Mesh::start("e2e/mesh", 11);
    println!(
        "the mesh is up after {:.1} s",
        begun.elapsed().as_secs_f32()
    );
    let mut failed = Vec::new();
    let mut passed = 0;
    for (name, case) in cases::CASES {
        if !filter.is_empty() && !filter.iter().any(|f| name.contains(f.as_str())) {
            continue;
        }
        let begun = Instant::now();
        // A case that fails has said why; the others still run.
        match panic::catch_unwind(panic::AssertUnwindSafe(|| case(&mesh))) {
            Ok(()) => {
                passed += 1;
                println!(
                    "test {name} ... ok ({:.1} s)",
                    begun.elapsed().as_secs_f32()
                );
            }
            Err(why) => {
                println!("test {name} ... FAILED");
                let said = why.downcast_ref::<String>().map(String::as_str);
                let said = said.or(why.downcast_ref::<&str>().copied());
                failed.push((*name, said.unwrap_or("it panicked").to_owned()));
            }
        }
    }
    if !failed.is_empty() {
        mesh.explain();
    }
    drop(mesh);
    // Last, since the end of a long log is what is looked at first.
    for (name, why) in &failed {
        println!("{name}: {why}");
    }
    let failed: Vec<_> = failed.iter().map(|(name, _)| name).collect();
    println!(
        "test result: {passed} passed; {} failed {failed:?}",
        failed.len()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
