//! The programs that demo and test pods run, built into this one: bookinfo's four services, an echo server for HTTP,
//! TCP and gRPC, and a client for all three.
//!
//! They are ordinary applications: they know nothing of the mesh, and pass on the tracing headers as any must.

mod bookinfo;
mod call;
mod echo;
mod grpc;
mod http;

use std::{ffi::OsString, future::Future, process::ExitCode};

/// `outrigger bookinfo SERVICE [PORT]`; `args[0]` is the command's own name.
pub fn bookinfo(args: Vec<OsString>) -> ExitCode {
    run(bookinfo::main(args))
}

/// `outrigger echo [--http PORT] [--tcp PORT] [--grpc PORT]`; `args[0]` is the command's own name.
pub fn echo(args: Vec<OsString>) -> ExitCode {
    run(echo::main(args))
}

/// `outrigger call URL`; `args[0]` is the command's own name.
pub fn call(args: Vec<OsString>) -> ExitCode {
    run(call::main(args))
}

fn run(work: impl Future<Output = Result<(), String>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("outrigger: the runtime did not start: {e}");
            return ExitCode::FAILURE;
        }
    };
    match tokio::task::LocalSet::new().block_on(&runtime, work) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
