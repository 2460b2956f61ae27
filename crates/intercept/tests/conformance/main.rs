//! What our istio-iptables leaves in the kernel, against what the real one leaves there.
//!
//! Every case gets a network and a mount namespace of its own. This binary is also the command under test: started
//! with `istio-iptables` as its first argument it runs the room's command line. Needs root, unshare, ip and iptables;
//! what is missing fails where `CI` is set and is said aloud elsewhere.

#[path = "../../../testkit/src/conformance.rs"]
mod finder;
#[allow(unreachable_pub, reason = "it is a file of testkit")]
#[path = "../../../testkit/src/needs.rs"]
mod needs;
mod own;

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    process::{Command, ExitCode},
    time::Instant,
};

use outrigger_intercept::{
    Config, model::Table, nft, program, state::Tables, surroundings::Addresses,
};
use serde_json::Value;

fn main() -> ExitCode {
    let mut args: Vec<_> = env::args_os().collect();
    if args.get(1).is_some_and(|a| a == "istio-iptables") {
        args.remove(0);
        return outrigger_intercept::command::main(args);
    }
    if args.get(1).is_some_and(|a| a == "nft-verify") {
        return nft_verify(&args[2..]);
    }
    let filter: Vec<String> = env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let wanted = |name: &str| filter.is_empty() || filter.iter().any(|f| name.contains(f.as_str()));
    if env::args().any(|a| a == "--list") {
        return ExitCode::SUCCESS;
    }
    let programs = [
        "unshare",
        "ip",
        "iptables-nft",
        "iptables-legacy",
        "nft",
        "mount",
    ];
    if let Err(why) = needs::root_and("interception", &programs) {
        return needs::skipped(&why);
    }
    let mut failed = 0;
    let mut ran = 0;
    let mut check = |name: &str, outcome: Result<(), String>| {
        ran += 1;
        if let Err(why) = outcome {
            failed += 1;
            println!("FAILED {name}\n{why}");
        }
    };
    let started = Instant::now();
    for (name, test) in own::TESTS {
        if wanted(name) {
            check(name, test());
        }
    }
    if let Some(data) = finder::conformance("istio-iptables") {
        let cases = read_cases(&data);
        for (name, case) in &cases {
            for back_end in ["nft", "legacy"] {
                let name = format!("{name}.{back_end}");
                if wanted(&name) {
                    check(&name, conforms(&data, &name, case, back_end));
                }
            }
            let name = format!("{name}.native");
            if wanted(&name) {
                check(&name, conforms_natively(&data, &name, case));
            }
        }
    }
    println!(
        "{ran} checks, {failed} failed, {:.1} s",
        started.elapsed().as_secs_f32()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Prints how this namespace's rules of nft differ from those that these flags make.
fn nft_verify(args: &[std::ffi::OsString]) -> ExitCode {
    let args: Vec<String> = args
        .iter()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let differences = || -> Result<Vec<String>, outrigger_intercept::Error> {
        let mut config = Config::from_args(&args, &|name| env::var(name).ok())?;
        config.fill_from_pod(&Addresses::of_this_pod()?)?;
        nft::verify(&program::rules(&config)?)
    };
    match differences() {
        Ok(found) => found.iter().for_each(|d| println!("{d}")),
        Err(e) => println!("{e}"),
    }
    ExitCode::SUCCESS
}

fn read_cases(data: &Path) -> BTreeMap<String, Value> {
    let text = fs::read_to_string(data.join("cases.json")).expect("cases.json is readable");
    serde_json::from_str(&text).expect("cases.json is an object of cases")
}

/// Addresses, resolv.conf and environment of one pod.
#[derive(Default)]
struct Pod {
    addresses: Vec<String>,
    resolv_conf: String,
    env: Vec<(String, String)>,
}

impl Pod {
    fn plain() -> Pod {
        Pod {
            addresses: vec!["10.9.0.5/24".into()],
            ..Pod::default()
        }
    }

    /// Runs `script` in the pod; `$RUN` is the command under test, `$OUT` a folder for results.
    fn run(&self, script: &str, args: &[String]) -> tempfile::TempDir {
        let out = tempfile::tempdir().expect("a folder");
        let file = |name: &str, text: &str| {
            fs::write(out.path().join(name), text).expect("the folder is writable");
        };
        file("resolv.conf", &self.resolv_conf);
        let groups = fs::read_to_string("/etc/group").expect("/etc/group");
        file("group", &format!("{groups}java:x:777:\nftp:x:778:\n"));
        let mut setup = String::from(
            "set -e\nip link set lo up\nip link add eth0 type veth peer name peer0\n\
             ip link set eth0 up\nip link set peer0 up\n\
             mount --bind $OUT/resolv.conf /etc/resolv.conf\nmount --bind $OUT/group /etc/group\n",
        );
        for address in &self.addresses {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            setup.push_str(&format!("ip addr add {address} dev eth0{nodad}\n"));
        }
        setup.push_str("ip route add default via 10.9.0.1 2>/dev/null || true\nset +e\n");
        setup.push_str(script);
        let output = Command::new("unshare")
            .args(["-mn", "sh", "-c", &setup, "sh"])
            .args(args)
            .env("OUT", out.path())
            .env("RUN", env::current_exe().expect("a path"))
            .envs(self.env.iter().cloned())
            .output()
            .expect("unshare runs");
        file("stderr", &String::from_utf8_lossy(&output.stderr));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        out
    }
}

fn read(out: &tempfile::TempDir, name: &str) -> String {
    fs::read_to_string(out.path().join(name)).unwrap_or_default()
}

fn texts(value: &Value) -> Vec<String> {
    let list = value.as_array().expect("a list");
    list.iter()
        .map(|v| v.as_str().expect("a text").to_string())
        .collect()
}

fn conforms(data: &Path, name: &str, case: &Value, back_end: &str) -> Result<(), String> {
    let pod = pod_of(case);
    let script = format!(
        "$RUN istio-iptables \"$@\" --force-iptables-binary {back_end} >$OUT/log 2>$OUT/err\n\
         echo $? >$OUT/rc\n\
         iptables-{back_end}-save >$OUT/v4\nip6tables-{back_end}-save >$OUT/v6\n\
         (ip rule; ip -6 rule) >$OUT/rules\n\
         (ip route show table all type local; ip -6 route show table all type local) >$OUT/routes\n\
         ip -6 addr show dev lo >$OUT/lo\n\
         $RUN istio-iptables \"$@\" --force-iptables-binary {back_end} >$OUT/log2 2>&1\n\
         echo $? >$OUT/rc2\niptables-{back_end}-save >$OUT/again\n\
         $RUN istio-iptables \"$@\" --force-iptables-binary {back_end} --cleanup-only >>$OUT/log2 2>&1\n\
         iptables-{back_end}-save >$OUT/gone; ip6tables-{back_end}-save >>$OUT/gone\ntrue\n"
    );
    let out = pod.run(&script, &texts(&case["args"]));
    let rc = read(&out, "rc").trim().to_string();
    let expected_rc = case[format!("{back_end}_rc")].to_string();
    if rc != expected_rc {
        return Err(format!(
            "exit {rc}, expected {expected_rc}:\n{}",
            read(&out, "err")
        ));
    }
    for line in case["error"].as_array().into_iter().flatten() {
        let line = line.as_str().expect("a text");
        if !read(&out, "err").contains(line) {
            return Err(format!("error lacks {line:?}:\n{}", read(&out, "err")));
        }
    }
    let base = name.rsplit_once('.').expect("a back end").0;
    for family in ["v4", "v6"] {
        let golden = data.join(format!("iptables-save/{base}.{back_end}.{family}.save"));
        let golden = fs::read_to_string(golden).unwrap_or_default();
        same(&golden, &read(&out, family)).map_err(|e| format!("{family}: {e}"))?;
    }
    if let Some(routing) = case.get("policy_routing") {
        for (list, file) in [("rules", "rules"), ("routes", "routes")] {
            for line in texts(&routing[list]) {
                let words: Vec<&str> = line.split_whitespace().collect();
                let found = read(&out, file).lines().any(|l| {
                    l.split_whitespace()
                        .collect::<Vec<_>>()
                        .join(" ")
                        .contains(&words.join(" "))
                });
                if !found {
                    return Err(format!("{list} lack {line:?}:\n{}", read(&out, file)));
                }
            }
        }
    }
    if rc != "0" {
        return Ok(());
    }
    if read(&out, "rc2").trim() != "0" {
        return Err(format!("a second run fails:\n{}", read(&out, "log2")));
    }
    if !read(&out, "log2").contains("already in place") {
        return Err(format!(
            "a second run does not find its rules:\n{}",
            read(&out, "log2")
        ));
    }
    same(&read(&out, "v4"), &read(&out, "again")).map_err(|e| format!("second run: {e}"))?;
    let gone = read(&out, "gone");
    if gone.contains("ISTIO_") || gone.contains("\n-A ") {
        return Err(format!("clean-up leaves\n{gone}"));
    }
    Ok(())
}

fn pod_of(case: &Value) -> Pod {
    Pod {
        addresses: texts(&case["addresses"]),
        resolv_conf: case["resolv_conf"].as_str().unwrap_or_default().into(),
        env: case["env"]
            .as_object()
            .expect("an object")
            .iter()
            .map(|(k, v)| (k.clone(), v.as_str().expect("a text").into()))
            .collect(),
    }
}

/// `--native-nftables`: the listing of nft is the same, also after a second run.
fn conforms_natively(data: &Path, name: &str, case: &Value) -> Result<(), String> {
    let script = "$RUN istio-iptables \"$@\" --native-nftables >$OUT/log 2>$OUT/err\n\
                  echo $? >$OUT/rc\nnft -s list ruleset >$OUT/list\n\
                  $RUN nft-verify \"$@\" >$OUT/differences 2>&1\n\
                  $RUN istio-iptables \"$@\" --native-nftables >$OUT/log 2>>$OUT/err\n\
                  nft -s list ruleset >$OUT/again\n\
                  $RUN istio-iptables \"$@\" --native-nftables --cleanup-only >$OUT/log 2>>$OUT/err\n\
                  nft -s list ruleset >$OUT/gone\ntrue\n";
    let out = pod_of(case).run(script, &texts(&case["args"]));
    let rc = read(&out, "rc").trim().to_string();
    if !rc.parse().is_ok_and(|rc: i64| case["native_rc"] == rc) {
        return Err(format!("exit {rc}:\n{}", read(&out, "err")));
    }
    let base = name.rsplit_once('.').expect("a back end").0;
    let golden = data.join(format!("nft-list/{base}.list"));
    let golden = nft_chains(&fs::read_to_string(golden).unwrap_or_default());
    for file in ["list", "again"] {
        let found = nft_chains(&read(&out, file));
        for key in golden.keys().chain(found.keys()) {
            let (e, f) = (golden.get(key), found.get(key));
            if e != f {
                return Err(format!("{file}: {key}:\nexpected {e:#?}\nfound {f:#?}"));
            }
        }
    }
    if rc == "0" && !read(&out, "differences").is_empty() {
        return Err(format!(
            "what was written is not found:\n{}",
            read(&out, "differences")
        ));
    }
    match read(&out, "gone").trim() {
        "" => Ok(()),
        left => Err(format!("clean-up leaves\n{left}")),
    }
}

/// The lines of every chain by `table chain`.
fn nft_chains(list: &str) -> BTreeMap<String, Vec<String>> {
    let (mut table, mut chain) = (String::new(), String::new());
    let mut out = BTreeMap::<String, Vec<String>>::new();
    for line in list.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {").into();
        } else if let Some(name) = line.strip_prefix("chain ") {
            chain = format!("{table} {}", name.trim_end_matches(" {"));
            out.entry(chain.clone()).or_default();
        } else if !line.is_empty() && line != "}" {
            out.entry(chain.clone()).or_default().push(line.into());
        }
    }
    out
}

/// The same ISTIO chains, and in every chain the same rules in order.
fn same(expected: &str, found: &str) -> Result<(), String> {
    let clean = |text: &str| {
        let mut out = BTreeMap::new();
        for (table, chains) in Tables::parse(text).0 {
            for (chain, rules) in chains {
                if chain.starts_with("ISTIO") || !rules.is_empty() {
                    out.insert((table, chain), rules);
                }
            }
        }
        out
    };
    let (expected, found) = (clean(expected), clean(found));
    let show = |t: &Table, c: &str, r: Option<&Vec<String>>| match r {
        Some(r) => format!("{t} {c}:\n    {}", r.join("\n    ")),
        None => format!("{t} {c}: not there"),
    };
    for (table, chain) in expected.keys().chain(found.keys()) {
        let key = (*table, chain.clone());
        let (e, f) = (expected.get(&key), found.get(&key));
        if e != f {
            return Err(format!(
                "expected {}\n  found {}",
                show(table, chain, e),
                show(table, chain, f)
            ));
        }
    }
    Ok(())
}
