//! `istio-iptables`: the command line of this room.

use std::{env, ffi::OsString, fs::File, process::ExitCode};

use nix::sched::{CloneFlags, setns};

use crate::{
    Error, apply, config::Config, ebpf, nft, options, program, selftest, surroundings::Addresses,
};

/// Runs the command; `args[0]` is its own name. Ends with 1 for settings, programs and rules that fail, 126 when the
/// self-test fails, 255 for a command line that cannot be read.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let args: Vec<String> = args
        .into_iter()
        .skip(1)
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    if args.iter().any(|a| a == "-h" || a == "--help") {
        print!("{}", help());
        return ExitCode::SUCCESS;
    }
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error\t{e}");
            ExitCode::from(e.exit_code())
        }
    }
}

fn run(args: &[String]) -> Result<(), Error> {
    let environment = |name: &str| env::var(name).ok();
    let mut config = Config::from_args(args, &environment)?;
    if !config.network_namespace.is_empty() {
        enter(&config.network_namespace)?;
    }
    let addresses = Addresses::of_this_pod()?;
    config.fill_from_pod(&addresses)?;
    let mut log = |text: String| println!("info\t{text}");
    log(config.log(&environment));
    if let Some(address) = addresses.uncaptured_ipv6(config.dual_stack) {
        log(format!(
            "warning: the pod has the IPv6 address {address}, and IPv6 is not captured; --dual-stack captures it"
        ));
    }
    config.validate()?;
    let dns = config.redirect_dns && !config.capture_all_dns;
    if dns && config.dns_servers_v4.is_empty() && config.dns_servers_v6.is_empty() {
        log(
            "warning: DNS is not captured: /etc/resolv.conf names no server; --capture-all-dns captures every query"
                .into(),
        );
    }
    let rules = program::rules(&config)?;
    if !config.skip_rule_apply {
        if config.ebpf() {
            ebpf::apply(&config, &rules, &mut log)?;
        } else if config.native_nftables {
            beside_programs(&config, &mut log, |log| nft::apply(&config, &rules, log))?;
        } else if config.dry_run {
            apply::dry_run(&config, &rules, environment("DRY_RUN_FILE_PATH"), &mut log)?;
        } else {
            beside_programs(&config, &mut log, |log| apply::apply(&config, &rules, log))?;
        }
    }
    if config.run_validation {
        selftest::run(&config, &addresses, &rules, &mut log)?;
    }
    Ok(())
}

/// Runs `apply` where eBPF programs may capture already: they go when they are to, and otherwise are in the way.
fn beside_programs(
    config: &Config,
    log: apply::Log<'_>,
    apply: impl FnOnce(apply::Log<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    if config.cleanup_only && !config.dry_run {
        ebpf::remove(log)?;
        return apply(log);
    }
    if !config.reconcile && !config.dry_run && ebpf::present() {
        return Err(Error::Conflict(
            "eBPF programs capture here; nothing was changed. --reconcile replaces them, --cleanup-only removes them"
                .into(),
        ));
    }
    apply(log)?;
    if config.reconcile && !config.dry_run {
        ebpf::remove(log)?;
    }
    Ok(())
}

pub(crate) fn enter(path: &str) -> Result<(), Error> {
    let file = File::open(path).map_err(|why| Error::File {
        path: path.into(),
        why,
    })?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(|e| Error::File {
        path: path.into(),
        why: e.into(),
    })
}

fn help() -> String {
    let mut out = String::from(
        "Writes the rules that lead this pod's connections through its proxy.\n\n\
         Usage: istio-iptables [flags]\n\nFlags (each but --envoy-port can be set by an environment variable of its \
         name in capitals, with _ for -):\n",
    );
    for flag in options::FLAGS.iter().filter(|f| !f.help.is_empty()) {
        let short = flag
            .short
            .map(|c| format!("-{c}, "))
            .unwrap_or("    ".into());
        out.push_str(&format!("  {short}--{:<36}{}\n", flag.long, flag.help));
    }
    out.push_str(
        "\nEnvironment only: ISTIO_OUTBOUND_OWNER_GROUPS (*), ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE,\n\
         ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR (127.0.0.1/32), ENVOY_USER (istio-proxy), DRY_RUN_FILE_PATH.\n",
    );
    out
}
