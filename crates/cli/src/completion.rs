//! `outrigger completion SHELL`: a completion script of all commands.

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory, Parser};
use clap_complete::Shell;

use crate::{COMMANDS, proxy_config::ProxyConfig, proxy_status::ProxyStatus};

/// Print a completion script; e.g. `source <(outrigger completion bash)`.
#[derive(Debug, Parser)]
#[command(name = "outrigger completion")]
struct Completion {
    /// The shell to write it for.
    shell: Shell,
}

/// Runs the command line; `args[0]` is the command's own name.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    crate::finish(Completion::try_parse_from(args), |c| {
        let mut command = clap::Command::new("outrigger");
        for known in COMMANDS {
            let sub = match known.name {
                "proxy-config" => ProxyConfig::command(),
                "proxy-status" => ProxyStatus::command(),
                _ => clap::Command::new(known.name),
            };
            let sub = sub
                .name(known.name)
                .about(known.about)
                .visible_aliases(known.aliases);
            command = command.subcommand(sub);
        }
        clap_complete::generate(c.shell, &mut command, "outrigger", &mut std::io::stdout());
        Ok(())
    })
}
