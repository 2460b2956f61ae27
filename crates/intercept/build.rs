//! Compiles the eBPF programs with clang, where it is there.
//!
//! Nobody should need clang to build a mesh that uses iptables, and a compiled object in the repository could not be
//! read by whoever reviews it: so the programs are built from their text or, without clang, left out, and the mode EBPF
//! then says what is missing.

use std::{env, fs, path::PathBuf, process::Command};

fn main() {
    for file in ["bpf/capture.bpf.c", "bpf/shared.h", "bpf/kernel.h"] {
        println!("cargo::rerun-if-changed={file}");
    }
    println!("cargo::rerun-if-env-changed=CLANG");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("capture.bpf.o");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    // Debian keeps <asm/types.h> in a folder of the machine's kind.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let done = Command::new(&clang)
        .args([
            "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror",
        ])
        .arg(format!("-I/usr/include/{arch}-linux-gnu"))
        .args(["-c", "bpf/capture.bpf.c", "-o"])
        .arg(&out)
        .output();
    let why = match done {
        Ok(done) if done.status.success() => return,
        Ok(done) => String::from_utf8_lossy(&done.stderr).into_owned(),
        Err(e) => format!("{clang}: {e}"),
    };
    for line in why.lines() {
        println!("cargo::warning={line}");
    }
    println!(
        "cargo::warning=built without the eBPF programs: --istio-inbound-interception-mode=EBPF will not work"
    );
    fs::write(out, []).expect("the folder is cargo's");
}
