//! `outrigger`: the whole mesh in one program.
//!
//! The first argument names the command; a link named `envoy`, `istio-iptables` or `pilot-agent` chooses it as well,
//! so that the program can stand in for the ones that pod templates name. Each command belongs to a room, which
//! takes its own arguments apart: this file only finds it.

mod authz;
mod check;
mod completion;
mod install;
#[cfg(test)]
mod play;
mod pod;
mod proxy_config;
mod proxy_status;
mod router_check;
mod validate;

use std::{
    env,
    ffi::OsString,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

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
        name: "authz",
        aliases: &["authorization"],
        about: "show the policies that a pod's proxy has in force, and the files that they come from",
        run: authz::main,
    },
    Command {
        name: "bookinfo",
        aliases: &[],
        about: "run a service of the bookinfo example",
        run: local::samples::bookinfo,
    },
    Command {
        name: "call",
        aliases: &[],
        about: "call a service over HTTP, gRPC or TCP and print what came back",
        run: local::samples::call,
    },
    Command {
        name: "check",
        aliases: &["precheck"],
        about: "say what in a Kubernetes cluster would break the mesh, or does",
        run: check::main,
    },
    Command {
        name: "cni",
        aliases: &["istio-cni"],
        about: "be the CNI plug-in: capture a pod's traffic from the node",
        run: cni::command::main,
    },
    Command {
        name: "completion",
        aliases: &[],
        about: "print a completion script: bash, zsh or fish",
        run: completion::main,
    },
    Command {
        name: "control",
        aliases: &["pilot-discovery"],
        about: "run the control plane",
        run: control::command::main,
    },
    Command {
        name: "echo",
        aliases: &[],
        about: "run a server that tells what of a call arrived",
        run: local::samples::echo,
    },
    Command {
        name: "install",
        aliases: &[],
        about: "install the mesh in a Kubernetes cluster, or print what that would apply",
        run: install::install,
    },
    Command {
        name: "intercept",
        aliases: &[],
        about: "explain, verify and guard the interception of this network namespace",
        run: intercept::tool::main,
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
    Command {
        name: "proxy-config",
        aliases: &["pc"],
        about: "show what a proxy is configured with",
        run: proxy_config::main,
    },
    Command {
        name: "proxy-status",
        aliases: &["ps"],
        about: "show how far each proxy is with its configuration",
        run: proxy_status::main,
    },
    Command {
        name: "router-check",
        aliases: &["router_check_tool"],
        about: "check a route configuration with tests in Envoy's router_check format",
        run: router_check::main,
    },
    Command {
        name: "tag",
        aliases: &[],
        about: "name revisions, so that namespaces need not change with an upgrade",
        run: install::tag::main,
    },
    Command {
        name: "uninstall",
        aliases: &[],
        about: "take the mesh out of a Kubernetes cluster",
        run: install::uninstall,
    },
    Command {
        name: "upgrade",
        aliases: &[],
        about: "bring an installed mesh to this version",
        run: install::upgrade,
    },
    Command {
        name: "validate",
        aliases: &[],
        about: "check files of Istio objects as the webhook would",
        run: validate::main,
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
            // Whoever reads only the first lines has closed the pipe: no reason to panic.
            let _ = write!(io::stdout(), "{}", help());
            ExitCode::SUCCESS
        }
        Some(name) => match find(name) {
            Some(command) => {
                args.remove(0);
                (command.run)(args)
            }
            None => {
                let _ = writeln!(
                    io::stderr(),
                    "outrigger: unknown command {name:?}\n\n{}",
                    help()
                );
                ExitCode::from(2)
            }
        },
    }
}

/// Runs a parsed command line. A mistake in the flags ends with 2, help with 0, an error with 1.
fn finish<T>(
    parsed: Result<T, clap::Error>,
    run: impl FnOnce(T) -> anyhow::Result<()>,
) -> ExitCode {
    let command = match parsed {
        Ok(command) => command,
        Err(e) => {
            // Nothing is left to do where standard error is gone, too.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("Error: {e:#}");
            ExitCode::FAILURE
        }
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
