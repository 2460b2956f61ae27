//! `outrigger-proxy`: what runs inside a pod — agent, proxy and interception, without any control-plane code.

use std::{env, ffi::OsString, path::Path, process::ExitCode};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let mut args: Vec<OsString> = env::args_os().collect();
    let name = |arg: &OsString| {
        Path::new(arg)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    if let Some(run) = args.first().map(name).as_deref().and_then(command) {
        return run(args);
    }
    let Some(run) = args.get(1).map(name).as_deref().and_then(command) else {
        eprintln!("Usage: outrigger-proxy agent|cni|intercept|istio-iptables|proxy [ARGUMENTS]");
        return ExitCode::from(2);
    };
    args.remove(0);
    run(args)
}

fn command(name: &str) -> Option<fn(Vec<OsString>) -> ExitCode> {
    Some(match name {
        "agent" | "pilot-agent" => agent::command::main,
        "cni" | "istio-cni" => cni::command::main,
        "envoy" | "proxy" => proxy::command::main,
        "intercept" => intercept::tool::main,
        "istio-iptables" => intercept::command::main,
        _ => return None,
    })
}
