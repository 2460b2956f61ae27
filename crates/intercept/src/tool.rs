//! `outrigger intercept`: what can be asked of the capture once it is there.

use std::{env, ffi::OsString, process::ExitCode};

use crate::{
    Error, config::Config, ebpf, explain, guard, outsider, program, selftest,
    surroundings::Addresses,
};

const USAGE: &str = "\
Usage: outrigger intercept COMMAND [ARGUMENTS]

Commands:
  explain   walk a packet through the rules: which match, and where it ends
  verify    prove with connections that the capture works here (takes istio-iptables' flags; exit status 126 if not)
  ebpf      show the eBPF programs of this network namespace, their rules with packets, and counters
  guard     watch the rules of this network namespace and report, or with --repair undo, every change
";

/// Runs the command; `args[0]` is its own name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let args: Vec<String> = args
        .into_iter()
        .skip(1)
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let rest = args.get(1..).unwrap_or_default();
    let outcome = match args.first().map(String::as_str) {
        Some("explain") => explain::command::run(rest).map(|story| print!("{story}")),
        Some("verify") => verify(rest),
        Some("ebpf") => ebpf::report::text().map(|text| print!("{text}")),
        Some("guard") => guard::command(rest),
        None | Some("help" | "-h" | "--help") => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Some(other) => {
            eprintln!("outrigger intercept: unknown command {other:?}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error\t{e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// The self-test alone, against whatever rules are here.
fn verify(args: &[String]) -> Result<(), Error> {
    let mut config = Config::from_args(args, &|name| env::var(name).ok())?;
    if !config.network_namespace.is_empty() {
        crate::command::enter(&config.network_namespace)?;
    }
    config.skip_rule_apply = true;
    let addresses = Addresses::of_this_pod()?;
    config.fill_from_pod(&addresses)?;
    config.validate()?;
    let rules = program::rules(&config)?;
    let mut log = |text: String| println!("info\t{text}");
    selftest::run(&config, &addresses, &rules, &mut log)?;
    outsider::verify(&config, &mut log)
}
