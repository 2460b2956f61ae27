//! The programs that reach the kernel: which of them to use, their locks, and what their failures mean.
//!
//! A pod may live on a node whose kernel knows only nft or only legacy iptables, and an image may carry both sets of
//! programs. Rules written with one are invisible to the other, so the choice is made as istio-iptables makes it:
//! legacy if it works and already holds rules, else nft if it works, else the program without a suffix.

use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::{Error, config::Config, model::Family};

/// What each back end holds of a family. Legacy tables come into being when they are asked for, so they are asked only
/// where there are any.
pub(crate) fn held(family: Family) -> Vec<String> {
    let mut out: Vec<String> = Backend::saved(family, "nft").into_iter().collect();
    if legacy_tables(family) {
        out.extend(Backend::saved(family, "legacy"));
    }
    out
}

/// Whether this network namespace has tables of legacy iptables.
pub(crate) fn legacy_tables(family: Family) -> bool {
    let names = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    fs::read_to_string(names).is_ok_and(|text| !text.is_empty())
}

/// One family's programs.
#[derive(Clone, Debug)]
pub struct Backend {
    family: Family,
    /// `legacy`, `nft` or empty for the programs without suffix.
    suffix: &'static str,
    nft: bool,
    version: Version,
    lock: Option<PathBuf>,
}

/// A version of iptables, major to patch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32, u32);

/// What a program printed, and whether it ended well.
#[derive(Debug)]
pub struct Answer {
    /// Its exit status.
    pub code: i32,
    /// Its output.
    pub stdout: String,
    /// Its complaints.
    pub stderr: String,
}

impl Backend {
    /// The programs to use for one family.
    pub fn find(config: &Config, family: Family) -> Result<Backend, Error> {
        match config.force_iptables_binary.as_str() {
            "legacy" => return Backend::usable(config, family, "legacy"),
            "nft" => return Backend::usable(config, family, "nft"),
            _ => {}
        }
        // Istio calls legacy tables in use once they exist, and its own trial makes them exist: a second run would
        // then write every rule again, into the other back end. Only rules count here, and ours before any other.
        let held = |suffix| Backend::new(family, suffix).save().unwrap_or_default();
        if legacy_tables(family)
            && held("legacy").contains("\n-A ")
            && !held("nft").contains("\n:ISTIO_")
            && let Ok(backend) = Backend::usable(config, family, "legacy")
        {
            return Ok(backend);
        }
        let mut reasons = Vec::new();
        for suffix in ["nft", "", "legacy"] {
            match Backend::usable(config, family, suffix) {
                Ok(backend) => return Ok(backend),
                Err(e) => reasons.push(e.to_string()),
            }
        }
        Err(Error::Backend(format!(
            "no usable iptables for {}: {}",
            name(family),
            reasons.join("; ")
        )))
    }

    /// What one set of programs (`nft` or `legacy`) shows, without asking whether it can write as well.
    pub fn saved(family: Family, suffix: &'static str) -> Result<String, Error> {
        Backend::new(family, suffix).save()
    }

    /// The programs of one set, ready to write.
    pub fn named(family: Family, suffix: &'static str) -> Result<Backend, Error> {
        Backend::usable(&Config::default(), family, suffix)
    }

    fn new(family: Family, suffix: &'static str) -> Backend {
        Backend {
            family,
            suffix,
            nft: suffix == "nft",
            version: Version::default(),
            lock: None,
        }
    }

    /// The programs with that suffix, if they work here.
    fn usable(config: &Config, family: Family, suffix: &'static str) -> Result<Backend, Error> {
        let mut backend = Backend::new(family, suffix);
        // What is called nft is nft, and needs no lock whatever its version.
        if suffix != "nft" {
            let answer = backend.run(&backend.program("-save"), &["--version"], None)?;
            if !answer.stderr.contains("unrecognized option") {
                backend.nft = answer.stdout.contains("nf_tables");
                backend.version = Version::parse(&answer.stdout);
            }
        }
        if config.cni_mode && !config.network_namespace.is_empty() {
            // A lock of the pod's own: the node's is contended by every pod and by kube-proxy.
            backend.lock = Some(PathBuf::from(&config.network_namespace));
        }
        backend.try_rule()?;
        Ok(backend)
    }

    /// Proves that the nat table can be written: a kernel module may be missing although the programs are there. The
    /// rule comes and goes in one transaction.
    fn try_rule(&self) -> Result<(), Error> {
        const TRIAL: &str = "*nat\n-A INPUT -p 255 -j RETURN\n-D INPUT -p 255 -j RETURN\nCOMMIT\n";
        self.restore(TRIAL, false)
    }

    /// The output of `iptables-save`.
    pub fn save(&self) -> Result<String, Error> {
        let program = self.program("-save");
        let answer = self.run(&program, &[], None)?;
        match answer.code {
            0 => Ok(answer.stdout),
            _ => Err(self.error(&program, &answer)),
        }
    }

    /// Feeds `text` to `iptables-restore`. Each table is written atomically. With `flush`, what the tables named in
    /// the text hold is dropped first.
    pub fn restore(&self, text: &str, flush: bool) -> Result<(), Error> {
        let program = self.program("-restore");
        let mut args = Vec::new();
        if !flush {
            args.push("--noflush");
        }
        args.extend(self.wait());
        let answer = self.run(&program, &args, Some(text))?;
        match answer.code {
            0 => Ok(()),
            _ => Err(self.error(&program, &answer)),
        }
    }

    /// The name of a program of this back end: `""`, `"-save"` or `"-restore"`.
    pub fn program(&self, part: &str) -> String {
        let base = match self.family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        match self.suffix {
            "" => format!("{base}{part}"),
            suffix => format!("{base}-{suffix}{part}"),
        }
    }

    /// nft needs no lock; legacy programs before 1.6.2 know no waiting.
    fn wait(&self) -> Option<&'static str> {
        (!self.nft && self.version >= Version(1, 6, 2)).then_some("--wait=30")
    }

    fn run(&self, program: &str, args: &[&str], input: Option<&str>) -> Result<Answer, Error> {
        let mut command = Command::new(program);
        command
            .args(args)
            .stdin(if input.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(lock) = &self.lock {
            command.env("XTABLES_LOCKFILE", lock);
        }
        let missing = |e: std::io::Error| {
            Error::Backend(format!("{program}: {e}; install iptables in this image"))
        };
        let mut child = command.spawn().map_err(missing)?;
        if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
            // A program that ends early closes the pipe; its status tells why.
            let _ = stdin.write_all(text.as_bytes());
        }
        let output = child.wait_with_output().map_err(missing)?;
        Ok(Answer {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    fn error(&self, command: &str, answer: &Answer) -> Error {
        let meaning = match answer.code {
            1 => "failed",
            2 => "bad parameter",
            3 => "version of program and kernel differ",
            4 => "resource problem, often another program that holds the lock",
            _ => "failed",
        };
        Error::Command {
            command: command.into(),
            meaning: format!("exit status {}, {meaning}", answer.code),
            stderr: answer.stderr.trim().into(),
            hint: hint(&answer.stderr, self.nft)
                .map(|h| format!(" ({h})"))
                .unwrap_or_default(),
        }
    }
}

fn hint(stderr: &str, nft: bool) -> Option<&'static str> {
    let says = |text: &str| stderr.contains(text);
    if says("Permission denied") || says("Operation not permitted") || says("you must be root") {
        Some(
            "writing rules needs root with NET_ADMIN and NET_RAW: \
             see securityContext.capabilities of the init container",
        )
    } else if says("does not exist") || says("can't initialize") || says("Protocol not supported") {
        Some(if nft {
            "the kernel lacks nf_tables with nat: load nf_tables, nft_compat and nft_chain_nat on the node, \
             or try --force-iptables-binary=legacy"
        } else {
            "the kernel lacks this table: load iptable_nat, ip6table_nat, iptable_mangle and iptable_raw on the node, \
             or try --force-iptables-binary=nft"
        })
    } else if says("No chain/target/match by that name") || says("missing kernel module") {
        Some(
            "the kernel lacks a match or target: load xt_REDIRECT, xt_owner, xt_multiport, xt_conntrack, xt_CT \
             and, for TPROXY, xt_TPROXY, xt_mark and xt_connmark on the node",
        )
    } else {
        None
    }
}

fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

impl Version {
    /// The first `v1.8.9` in a text.
    fn parse(text: &str) -> Version {
        let digits = text
            .split(|c: char| c.is_whitespace() || c == '(')
            .filter_map(|word| word.strip_prefix('v'))
            .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
            .unwrap_or_default();
        let mut parts = digits.split('.').map(|p| p.parse().unwrap_or(0));
        let mut next = || parts.next().unwrap_or(0);
        Version(next(), next(), next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let v = Version::parse("iptables-save v1.8.9 (nf_tables)\n");
        assert_eq!(v, Version(1, 8, 9));
        assert!(Version::parse("iptables v1.6.1") < Version(1, 6, 2));
        assert_eq!(Version::parse("nothing"), Version::default());
    }

    #[test]
    fn failures_name_the_module() {
        let hint = hint(
            "iptables v1.8.9 (legacy): can't initialize iptables table `nat'",
            false,
        );
        assert!(hint.unwrap().contains("iptable_nat"));
    }
}
