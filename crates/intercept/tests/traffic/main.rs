//! Traffic through the rules: every kind of call in every mode, with real packets.
//!
//! One table, one assertion a cell; a mode is a column. Two namespaces, a pod and the world outside it, joined by a
//! card. Needs root and the programs of each mode; what is missing fails where `CI` is set and is said aloud elsewhere.
//! This binary is also the command under test (`istio-iptables`, `intercept`).

#[allow(unreachable_pub, reason = "it is a file of testkit")]
#[path = "../../../testkit/src/bpffs.rs"]
mod bpffs;
mod churn;
#[allow(unreachable_pub, reason = "it is a file of testkit")]
#[path = "../../../testkit/src/conntrack.rs"]
mod conntrack;
mod ebpf;
mod full;
mod guard;
mod matrix;
#[allow(unreachable_pub, reason = "it is a file of testkit")]
#[path = "../../../testkit/src/needs.rs"]
mod needs;
mod net;

use std::{env, panic, process::ExitCode, time::Instant};

fn main() -> ExitCode {
    let mut args: Vec<_> = env::args_os().collect();
    let name = args.get(1).map(|a| a.to_string_lossy().into_owned());
    match name.as_deref() {
        Some("istio-iptables") => {
            args.remove(0);
            return outrigger_intercept::command::main(args);
        }
        Some("intercept") => {
            args.remove(0);
            return outrigger_intercept::tool::main(args);
        }
        _ => {}
    }
    let filter: Vec<String> = env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let mut tests: Vec<(String, Box<dyn Fn()>)> = Vec::new();
    for mode in matrix::MODES {
        tests.push((
            format!("matrix_{}", mode.name),
            Box::new(|| matrix::run(mode)),
        ));
    }
    for mode in matrix::MODES {
        tests.push((
            format!("connects_{}", mode.name),
            Box::new(|| churn::run(mode)),
        ));
    }
    // Filling the table takes seconds: one of each kind, and all where there is time.
    let long = env::var_os("OUTRIGGER_LONG").is_some();
    let kinds = ["iptables_nft", "tproxy", "tproxy_notrack", "ebpf"];
    for mode in matrix::MODES
        .iter()
        .filter(|m| long || kinds.contains(&m.name))
    {
        tests.push((
            format!("full_table_{}", mode.name),
            Box::new(|| full::run(mode)),
        ));
    }
    for (name, test) in guard::TESTS.iter().chain(ebpf::TESTS) {
        tests.push(((*name).into(), Box::new(test)));
    }
    if env::args().any(|a| a == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let programs = ["ip", "iptables-nft", "iptables-legacy", "nft"];
    if let Err(why) = needs::root_and("interception", &programs) {
        return needs::skipped(&why);
    }
    let _restore = bpffs::Restore::later();
    let mut failed = Vec::new();
    if !outrigger_intercept::ebpf::built() {
        println!("skipped: tests of mode EBPF need clang at the time of the build");
        tests.retain(|(name, _)| !name.contains("ebpf"));
        if env::var_os("CI").is_some() {
            failed.push("ebpf".into());
        }
    }
    for (name, test) in &tests {
        if !filter.is_empty() && !filter.iter().any(|f| name.contains(f.as_str())) {
            continue;
        }
        let begun = Instant::now();
        let outcome = panic::catch_unwind(panic::AssertUnwindSafe(test));
        let seconds = begun.elapsed().as_secs_f32();
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({seconds:.1} s)");
        if outcome.is_err() {
            failed.push(name.clone());
        }
    }
    println!("{} failed {failed:?}", failed.len());
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
