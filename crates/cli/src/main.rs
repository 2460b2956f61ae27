//! `outrigger`: the whole mesh in one program.
//!
//! The first argument names the command; a link named `envoy`, `istio-iptables` or `pilot-agent` chooses it as well,
//! so that the program can stand in for the ones that pod templates name. Each command belongs to a room, which
//! takes its own arguments apart: this file only finds it.

use std::{env, ffi::OsString, path::Path, process::ExitCode};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A command: its name, its other names (links included), one line of help, and where it starts.
struct Command {
    name: &'static str,
    aliases: &'static [&'static str],
    about: &'static str,
    run: fn(Vec<OsString>) -> ExitCode,
}

const COMMANDS: &[Command] = &[
    Command {
        name: "agent",
        aliases: &["pilot-agent"],
        about: "run the pod agent: bootstrap, xDS relay, readiness, and the proxy as its child",
        run: agent::command::main,
    },
    Command {
        name: "control",
        aliases: &["pilot-discovery"],
        about: "run the control plane",
        run: control::command::main,
    },
    Command {
        name: "istio-iptables",
        aliases: &[],
        about: "write the interception rules of this network namespace",
        run: intercept::command::main,
    },
    Command {
        name: "kube-inject",
        aliases: &[],
        about: "add the sidecar to Kubernetes workloads",
        run: inject::command::main,
    },
    Command {
        name: "local",
        aliases: &[],
        about: "run a mesh on this machine: pods as network namespaces, from a folder of YAML",
        run: local::command::main,
    },
    Command {
        name: "proxy",
        aliases: &["envoy"],
        about: "run the proxy",
        run: proxy::command::main,
    },
];

fn main() -> ExitCode {
    let mut args: Vec<OsString> = env::args_os().collect();
    if let Some(command) = args.first().and_then(|a| find(&file_name(a))) {
        return (command.run)(args);
    }
    let name = args.get(1).map(|a| a.to_string_lossy().into_owned());
    match name.as_deref() {
        None | Some("help" | "-h" | "--help") => {
            print!("{}", help());
            ExitCode::SUCCESS
        }
        Some(name) => match find(name) {
            Some(command) => {
                args.remove(0);
                (command.run)(args)
            }
            None => {
                eprintln!("outrigger: unknown command {name:?}\n\n{}", help());
                ExitCode::from(2)
            }
        },
    }
}

fn file_name(arg: &OsString) -> String {
    Path::new(arg)
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn find(name: &str) -> Option<&'static Command> {
    COMMANDS
        .iter()
        .find(|c| c.name == name || c.aliases.contains(&name))
}

fn help() -> String {
    let mut out = String::from("Usage: outrigger COMMAND [ARGUMENTS]\n\nCommands:\n");
    for c in COMMANDS {
        out.push_str(&format!("  {:<16}{}\n", c.name, c.about));
    }
    out.push_str("\n`outrigger COMMAND --help` tells more.\n");
    out
}
