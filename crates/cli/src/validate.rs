//! `outrigger validate -f FILE`: what the webhook would say, without a cluster.

use std::{
    ffi::OsString,
    fs,
    io::{IsTerminal, Read},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use clap::Parser;
use config::{Severity, Snapshot};

/// Check files of Istio objects.
///
/// Ends with 1 if an object would be refused. Objects of other kinds are passed over.
#[derive(Debug, Parser)]
#[command(name = "outrigger validate", version)]
struct Flags {
    /// File or folder to check; `-` is standard input. May be given several times.
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Taken without effect: the kinds of a file say what they are.
    #[arg(short = 'x', long, hide = true)]
    referential: Option<bool>,
}

/// Runs the command; `args[0]` is its own name.
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    crate::finish(Flags::try_parse_from(args), |flags| run(&flags))
}

fn run(flags: &Flags) -> anyhow::Result<()> {
    let mut texts = Vec::new();
    for file in &flags.files {
        read(file, &mut texts)?;
    }
    let all = texts
        .iter()
        .map(|(path, text)| (path.as_path(), text.as_str()));
    let (_, problems) = Snapshot::from_texts(all);
    let mut refused = 0;
    for p in &problems {
        let word = match p.severity {
            Severity::Error => {
                refused += 1;
                "error"
            }
            Severity::Warning => "warning",
        };
        eprintln!("{word}: {p}");
    }
    if refused > 0 {
        bail!("{refused} problems: these objects would be refused");
    }
    for (path, _) in &texts {
        println!("{:?} is valid", path.display().to_string());
    }
    Ok(())
}

fn read(path: &Path, out: &mut Vec<(PathBuf, String)>) -> anyhow::Result<()> {
    if path == Path::new("-") {
        let mut text = String::new();
        let mut input = std::io::stdin();
        if input.is_terminal() {
            eprintln!("reading from the terminal; end with Ctrl-D");
        }
        input.read_to_string(&mut text).context("-")?;
        out.push((path.to_owned(), text));
        return Ok(());
    }
    let what = || path.display().to_string();
    if !path.is_dir() {
        let text = fs::read_to_string(path).with_context(what)?;
        out.push((path.to_owned(), text));
        return Ok(());
    }
    let mut inside = Vec::new();
    for entry in fs::read_dir(path).with_context(what)? {
        inside.push(entry.with_context(what)?.path());
    }
    inside.sort();
    for path in inside {
        let kind = path.extension().and_then(|e| e.to_str());
        if path.is_dir() || matches!(kind, Some("yaml" | "yml" | "json")) {
            read(&path, out)?;
        }
    }
    Ok(())
}
