//! What our istio-iptables leaves in the kernel, against what the real one leaves there.
//!
//! Every case gets a network and a mount namespace of its own. This binary is also the command under test: started
//! with `istio-iptables` as its first argument it runs the room's command line. Needs root, unshare, ip and iptables;
//! what is missing fails where `CI` is set and is said aloud elsewhere.

#[path = "../../testkit/src/conformance.rs"]
mod finder;

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    process::{Command, ExitCode, Stdio},
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
    if let Err(why) = can_run() {
        return absent(&why);
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
    for (name, test) in OWN_TESTS {
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

fn absent(why: &str) -> ExitCode {
    println!("skipped: {why}");
    if env::var_os("CI").is_some() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn can_run() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("interception tests need root".into());
    }
    for program in [
        "unshare",
        "ip",
        "iptables-nft",
        "iptables-legacy",
        "nft",
        "mount",
    ] {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {program}")])
            .stdout(Stdio::null())
            .status()
            .is_ok_and(|s| s.success());
        if !found {
            return Err(format!("interception tests need {program}"));
        }
    }
    Ok(())
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

type Test = fn() -> Result<(), String>;

const OWN_TESTS: &[(&str, Test)] = &[
    ("self_test_passes_and_names_what_is_missing", self_test),
    ("other_rules_are_kept_unless_reconciled", reconcile),
    ("routing_of_tproxy_goes_with_its_rules", routing),
    ("untracked_rules_are_read_back_and_go", untracked),
    ("a_failing_table_takes_everything_back", roll_back),
    ("dry_run_touches_nothing", dry_run),
    ("mistakes_end_with_their_status", statuses),
    ("older_rules_are_those_that_older_documents_list", older),
    ("nft_rules_pass_the_self_test", native_self_test),
    (
        "a_rule_of_nft_that_is_gone_or_moved_is_named",
        native_differences,
    ),
    ("ranges_and_names_are_read_as_by_istio", as_istio),
];

const SIDECAR: &str =
    "-p 15001 -z 15006 -u 1337 -m REDIRECT -i '*' -x '' -b '*' -d 15090,15021,15020";

fn lacks(what: &str, text: &str, wanted: &str) -> Result<(), String> {
    if text.contains(wanted) {
        Ok(())
    } else {
        Err(format!("{what} lacks {wanted:?}:\n{text}"))
    }
}

fn self_test() -> Result<(), String> {
    let mut pod = Pod::plain();
    pod.addresses.push("2001:db8::5/64".into());
    let script = format!(
        "ip -6 route add default dev eth0\nip neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev eth0\n\
         $RUN istio-iptables {SIDECAR} --dual-stack --run-validation >$OUT/good 2>&1; echo $? >$OUT/rc\n\
         iptables -t nat -D ISTIO_OUTPUT -j ISTIO_REDIRECT\n\
         $RUN istio-iptables {SIDECAR} --dual-stack --run-validation --skip-rule-apply --probe-timeout 500ms \
         >$OUT/bad 2>&1; echo $? >$OUT/rc2\n"
    );
    let out = pod.run(&script, &[]);
    let good = read(&out, "good");
    if read(&out, "rc").trim() != "0" {
        return Err(good);
    }
    lacks(
        "the log",
        &good,
        "the proxy's call to its own pod to 127.0.0.6:15002 arrives at port 15006",
    )?;
    lacks(
        "the log",
        &good,
        "the proxy's call to its own pod to [::6]:15002 arrives at port 15006",
    )?;
    lacks(
        "the log",
        &good,
        "the app's call to the outside to 192.0.2.1:15002 arrives at port 15001",
    )?;
    lacks(
        "the log",
        &good,
        "the app's call to the outside to [2001:db8:ffff::1]:15002 arrives",
    )?;
    if read(&out, "rc2").trim() != "126" {
        return Err(format!("exit {}, expected 126", read(&out, "rc2")));
    }
    let bad = read(&out, "bad");
    lacks(
        "the error",
        &bad,
        "the app's call to the outside to 192.0.2.1:15002 does not arrive",
    )?;
    lacks(
        "the error",
        &bad,
        "table nat: ISTIO_OUTPUT lacks: -j ISTIO_REDIRECT",
    )?;
    lacks("the error", &bad, "cni.repair.deletePods")
}

fn reconcile() -> Result<(), String> {
    let script = format!(
        "iptables -t nat -A OUTPUT -d 10.1.1.1 -j ACCEPT\n\
         $RUN istio-iptables {SIDECAR} -c eth7 >$OUT/log 2>&1\niptables-save >$OUT/first\n\
         $RUN istio-iptables {SIDECAR} -b 9080 -p 15011 >$OUT/refused 2>&1; echo $? >$OUT/rc\n\
         iptables-save >$OUT/second\n\
         $RUN istio-iptables {SIDECAR} -b 9080 -p 15011 --reconcile >$OUT/log 2>&1; echo $? >$OUT/rc2\n\
         iptables-save >$OUT/third\n"
    );
    let out = Pod::plain().run(&script, &[]);
    if read(&out, "rc").trim() != "1" {
        return Err(format!("other rules: exit {}", read(&out, "rc")));
    }
    lacks(
        "the refusal",
        &read(&out, "refused"),
        "--reconcile replaces them",
    )?;
    lacks(
        "the refusal",
        &read(&out, "refused"),
        "ISTIO_INBOUND lacks: -p tcp -m tcp --dport 9080",
    )?;
    same(&read(&out, "first"), &read(&out, "second"))?;
    let third = read(&out, "third");
    if read(&out, "rc2").trim() != "0" {
        return Err(read(&out, "log"));
    }
    lacks("the kernel", &third, "-A OUTPUT -d 10.1.1.1/32 -j ACCEPT")?;
    lacks(
        "the kernel",
        &third,
        "-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15011",
    )?;
    lacks(
        "the kernel",
        &third,
        "-A ISTIO_INBOUND -p tcp -m tcp --dport 9080 -j ISTIO_IN_REDIRECT",
    )?;
    if third.contains("15001") || third.contains("eth7") {
        return Err(format!("old rules stay:\n{third}"));
    }
    Ok(())
}

/// Rules and routes for TPROXY's mark end when other rules replace it or a clean-up removes it, whatever mark and table
/// they had; somebody else's stay.
fn routing() -> Result<(), String> {
    let mut pod = Pod::plain();
    pod.addresses.push("2001:db8::5/64".into());
    for (program, other) in [
        ("--force-iptables-binary nft", "-m REDIRECT --reconcile"),
        ("--force-iptables-binary legacy", "-m REDIRECT --reconcile"),
        ("--force-iptables-binary nft", "-t 78 -m TPROXY --reconcile"),
        ("--native-nftables", "-m REDIRECT"),
        ("--force-iptables-binary nft", "--cleanup-only"),
        ("--native-nftables", "--cleanup-only"),
    ] {
        let script = format!(
            "show() {{ ip rule; ip -6 rule; ip route show table 300; ip -6 route show table 300; }}\n\
             ip rule add fwmark 9 lookup 99; ip route add local default dev lo table 99\n\
             ip rule add iif eth0 fwmark 77 lookup 300\n\
             $RUN istio-iptables -u 1337 -b '*' -m TPROXY -t 77 -r 300 --dual-stack {program} >$OUT/log 2>&1\n\
             $RUN istio-iptables -u 1337 -b '*' -m TPROXY -t 77 -r 300 --dual-stack {program} >>$OUT/log 2>&1\n\
             show >$OUT/before\n\
             $RUN istio-iptables -u 1337 -b '*' {other} {program} >>$OUT/log 2>&1; echo $? >$OUT/rc\n\
             show >$OUT/after; ip route show table 99 >$OUT/other\n"
        );
        let out = pod.run(&script, &[]);
        let count = |file: &str, what: &str| {
            let text = read(&out, file);
            let lines = text.lines().filter(|l| l.contains(what));
            lines.filter(|l| !l.contains("iif")).count()
        };
        let (rules, routes) = ("from all fwmark 0x4d lookup 300", "local default dev lo");
        if read(&out, "rc").trim() != "0"
            || (count("before", rules), count("before", routes)) != (2, 2)
            || (count("after", rules), count("after", routes)) != (0, 0)
        {
            let (before, after) = (read(&out, "before"), read(&out, "after"));
            return Err(format!(
                "{program}, {other}: {before}\nthen\n{after}\n{}",
                read(&out, "log")
            ));
        }
        lacks("the rules", &read(&out, "after"), "fwmark 0x9 lookup 99")?;
        lacks("the rules", &read(&out, "after"), "iif eth0 lookup 300")?;
        lacks("the routes", &read(&out, "other"), "local default dev lo")?;
    }
    Ok(())
}

/// What `--tproxy-notrack` adds is found by a second run, and a clean-up takes it away with its settings.
fn untracked() -> Result<(), String> {
    let mut pod = Pod::plain();
    pod.addresses.push("2001:db8::5/64".into());
    for (back_end, ports) in [
        ("nft", "-b '*' -d 15020,15021"),
        ("legacy", "-b 80,443 -c eth7"),
    ] {
        let flags = format!(
            "-u 1337 -i '*' -m TPROXY {ports} --dual-stack --tproxy-notrack --force-iptables-binary {back_end}"
        );
        let script = format!(
            "marks() {{ cat /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv?/fwmark_reflect | tr -d '\\n'; }}\n\
             $RUN istio-iptables {flags} >$OUT/log 2>&1\nmarks >$OUT/marks\niptables-{back_end}-save >$OUT/v4\n\
             $RUN istio-iptables {flags} >$OUT/again 2>&1\n\
             $RUN istio-iptables {flags} --drop-invalid >$OUT/refused 2>&1\n\
             $RUN istio-iptables -u 1337 -i '*' -m TPROXY {ports} --dual-stack --reconcile \
             --force-iptables-binary {back_end} >>$OUT/log 2>&1\nmarks >$OUT/marks2\niptables-{back_end}-save >$OUT/plain\n\
             $RUN istio-iptables {flags} --reconcile >>$OUT/log 2>&1\n\
             $RUN istio-iptables --cleanup-only --force-iptables-binary {back_end} >>$OUT/log 2>&1\nmarks >$OUT/marks3\n\
             (iptables-{back_end}-save; ip6tables-{back_end}-save; ip rule) >$OUT/gone\n"
        );
        let out = pod.run(&script, &[]);
        if read(&out, "log").contains("warning: read back") {
            return Err(read(&out, "log"));
        }
        lacks("the second run", &read(&out, "again"), "already in place")?;
        lacks(
            "the refusal",
            &read(&out, "refused"),
            "--drop-invalid does not go with --tproxy-notrack",
        )?;
        let wanted = match back_end {
            "nft" => {
                "-A ISTIO_NOTRACK -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j CT --notrack"
            }
            _ => {
                "-A ISTIO_NOTRACK -p tcp -m tcp --dport 80 --tcp-flags FIN,SYN,RST,ACK SYN -j CT --notrack"
            }
        };
        lacks("the kernel", &read(&out, "v4"), wanted)?;
        let marks = ["marks", "marks2", "marks3"].map(|file| read(&out, file));
        let (plain, gone) = (read(&out, "plain"), read(&out, "gone"));
        if marks != ["111", "000", "000"]
            || plain.contains("notrack")
            || gone.contains("ISTIO_")
            || gone.contains("\n-A ")
            || gone.contains("fwmark")
        {
            return Err(format!(
                "{marks:?}\n{plain}\nthen\n{gone}\n{}",
                read(&out, "log")
            ));
        }
    }
    Ok(())
}

/// The raw table comes after nat: a server port that iptables cannot take fails there, and in IPv6 after all of IPv4.
fn roll_back() -> Result<(), String> {
    let mut problems = String::new();
    for back_end in ["nft", "legacy"] {
        let script = format!(
            "iptables-{back_end} -t nat -A OUTPUT -d 10.1.1.1 -j ACCEPT\niptables-{back_end}-save >$OUT/first\n\
             $RUN istio-iptables {SIDECAR} -q 99999 --force-iptables-binary {back_end} --drop-invalid >$OUT/log 2>&1\n\
             echo $? >$OUT/rc\niptables-{back_end}-save >$OUT/second\n"
        );
        let out = Pod::plain().run(&script, &[]);
        if read(&out, "rc").trim() != "1" {
            problems.push_str(&format!("{back_end}: exit {}\n", read(&out, "rc")));
        }
        if let Err(e) = same(&read(&out, "first"), &read(&out, "second")) {
            problems.push_str(&format!("{back_end}: {e}\n"));
        }
        if let Err(e) = lacks(
            "the error",
            &read(&out, "log"),
            "exit status 2, bad parameter",
        ) {
            problems.push_str(&e);
        }
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems)
    }
}

fn dry_run() -> Result<(), String> {
    let mut pod = Pod::plain();
    pod.env
        .push(("DRY_RUN_FILE_PATH".into(), "/dev/stderr".into()));
    let script = format!(
        "$RUN istio-iptables {SIDECAR} -n >$OUT/log 2>$OUT/file; echo $? >$OUT/rc\niptables-save >$OUT/v4\n"
    );
    let out = pod.run(&script, &[]);
    lacks(
        "the log",
        &read(&out, "log"),
        "Running iptables restore with: iptables-restore",
    )?;
    lacks(
        "the log",
        &read(&out, "log"),
        "PROXY_INBOUND_CAPTURE_PORT=15006",
    )?;
    let file = read(&out, "file");
    let expected = "iptables-save\nip6tables-save\n* nat\n-N ISTIO_INBOUND\n";
    if !file.starts_with(expected) || !file.ends_with("COMMIT\niptables-save\n") {
        return Err(format!("the dry-run file reads\n{file}"));
    }
    same("", &read(&out, "v4"))
}

fn statuses() -> Result<(), String> {
    let script = "for a in '--nope' '-i 1.2.3/8' '--force-iptables-binary x'; do\n\
                  $RUN istio-iptables $a >/dev/null 2>>$OUT/err; echo $? >>$OUT/rc; done\n";
    let out = Pod::plain().run(script, &[]);
    if read(&out, "rc") != "255\n1\n1\n" {
        return Err(read(&out, "rc") + &read(&out, "err"));
    }
    let alone = Pod::default().run(
        "$RUN istio-iptables >/dev/null 2>$OUT/err; echo $? >$OUT/rc\n",
        &[],
    );
    lacks(
        "the error",
        &read(&alone, "err"),
        "no valid local IP address found",
    )?;
    Ok(())
}

/// The chains as `iptables -t nat -L -v` lists them, counters and host names aside.
fn older() -> Result<(), String> {
    let seed = "-p 15001 -z 15006 -u 1337 -m REDIRECT -i '*' -x ''";
    let script = format!(
        "$RUN istio-iptables {seed} -b 9080 -d 15090,15201,15020 --rules-version 1.3 >$OUT/log 2>&1\n\
         iptables -t nat -L -v >$OUT/v13\n\
         $RUN istio-iptables {seed} -b '*' -d 15090,15020 --rules-version=1.5 --reconcile >$OUT/log 2>&1\n\
         iptables -t nat -L -v >$OUT/v15\n\
         $RUN istio-iptables {seed} --redirect-dns --capture-all-dns --rules-version=1.5 >$OUT/log 2>$OUT/err; echo $? >$OUT/rc\n"
    );
    let out = Pod::plain().run(&script, &[]);
    let rows = |file: &str, chain: &str| -> Vec<String> {
        read(&out, file)
            .split("\n\n")
            .filter(|part| part.starts_with(&format!("Chain {chain} ")))
            .flat_map(|part| part.lines().skip(2))
            // Without counters and options; newer programs print the protocol's number where there is no name.
            .map(|l| l.split_whitespace().skip(2).collect::<Vec<_>>().join(" "))
            .map(|l| {
                l.replace(" 6 -- ", " tcp -- ")
                    .replace(" 0 -- ", " all -- ")
            })
            .collect()
    };
    let nine = [
        "RETURN all -- any lo 127.0.0.6 anywhere",
        "ISTIO_IN_REDIRECT all -- any lo anywhere !localhost owner UID match 1337",
        "RETURN all -- any lo anywhere anywhere ! owner UID match 1337",
        "RETURN all -- any any anywhere anywhere owner UID match 1337",
        "ISTIO_IN_REDIRECT all -- any lo anywhere !localhost owner GID match 1337",
        "RETURN all -- any lo anywhere anywhere ! owner GID match 1337",
        "RETURN all -- any any anywhere anywhere owner GID match 1337",
        "RETURN all -- any any anywhere localhost",
        "ISTIO_REDIRECT all -- any any anywhere anywhere",
    ];
    let five = [
        "ISTIO_REDIRECT all -- any lo anywhere !localhost",
        "RETURN all -- any any anywhere anywhere owner UID match 1337",
        "RETURN all -- any any anywhere anywhere owner GID match 1337",
        "RETURN all -- any any anywhere localhost",
        "ISTIO_REDIRECT all -- any any anywhere anywhere",
    ];
    let inbound = [
        "RETURN tcp -- any any anywhere anywhere tcp dpt:ssh",
        "RETURN tcp -- any any anywhere anywhere tcp dpt:15090",
        "RETURN tcp -- any any anywhere anywhere tcp dpt:15020",
        "ISTIO_IN_REDIRECT tcp -- any any anywhere anywhere",
    ];
    for (file, chain, expected) in [
        ("v13", "ISTIO_OUTPUT", &five[..]),
        (
            "v13",
            "OUTPUT",
            &["ISTIO_OUTPUT tcp -- any any anywhere anywhere"],
        ),
        (
            "v13",
            "ISTIO_INBOUND",
            &["ISTIO_IN_REDIRECT tcp -- any any anywhere anywhere tcp dpt:9080"],
        ),
        (
            "v13",
            "ISTIO_IN_REDIRECT",
            &["REDIRECT tcp -- any any anywhere anywhere redir ports 15006"],
        ),
        ("v15", "ISTIO_OUTPUT", &nine),
        ("v15", "ISTIO_INBOUND", &inbound),
        (
            "v15",
            "PREROUTING",
            &["ISTIO_INBOUND tcp -- any any anywhere anywhere"],
        ),
        (
            "v15",
            "ISTIO_REDIRECT",
            &["REDIRECT tcp -- any any anywhere anywhere redir ports 15001"],
        ),
    ] {
        let found = rows(file, chain);
        if found != expected {
            return Err(format!(
                "{file} {chain}:\nexpected {expected:#?}\nfound {found:#?}"
            ));
        }
    }
    lacks(
        "the error",
        &read(&out, "err"),
        "--redirect-dns does not go with --rules-version=1.5",
    )
}

fn native_self_test() -> Result<(), String> {
    let script = format!(
        "ip neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev eth0\n\
         $RUN istio-iptables {SIDECAR} --native-nftables --run-validation >$OUT/log 2>&1; echo $? >$OUT/rc\n"
    );
    let out = Pod::plain().run(&script, &[]);
    if read(&out, "rc").trim() != "0" {
        return Err(read(&out, "log"));
    }
    lacks(
        "the log",
        &read(&out, "log"),
        "the app's call to the outside to 192.0.2.1:15002 arrives",
    )
}

fn native_differences() -> Result<(), String> {
    let script = format!(
        "$RUN istio-iptables {SIDECAR} --native-nftables >$OUT/log 2>&1\n\
         T='inet istio-proxy-nat istio-output'\n\
         at() {{ nft -a list chain $T | grep \"$1\" | sed 's/.*# handle //' | head -1; }}\n\
         nft delete rule $T handle $(at 'ip daddr 127.0.0.1')\n\
         $RUN nft-verify {SIDECAR} >$OUT/gone\n\
         $RUN istio-iptables {SIDECAR} --native-nftables >>$OUT/log 2>&1\n\
         nft delete rule $T handle $(at 'ip daddr 127.0.0.1')\nnft add rule $T ip daddr 127.0.0.1 counter return\n\
         nft insert rule $T ip daddr 10.7.7.7 accept\nnft add chain inet istio-proxy-nat more\n\
         $RUN nft-verify {SIDECAR} >$OUT/moved\n"
    );
    let out = Pod::plain().run(&script, &[]);
    let expected = "table nat: istio-output lacks: ip daddr 127.0.0.1/32 counter return\n";
    if read(&out, "gone") != expected {
        return Err(read(&out, "gone") + &read(&out, "log"));
    }
    let moved = read(&out, "moved");
    lacks(
        "the text",
        &moved,
        "table nat: istio-output should not have: ip daddr 10.7.7.7/32 accept",
    )?;
    lacks(
        "the text",
        &moved,
        "table nat: chain more should not be there",
    )
}

/// What the given cases do not show, and Istio's program does.
fn as_istio() -> Result<(), String> {
    let script = "run() { $RUN istio-iptables -u 1337 -b '*' \"$@\" >/dev/null 2>>$OUT/err; echo $? >>$OUT/rc; }\n\
                  run -i '10.0.0.0/8, 10.1.0.0/16'\n\
                  run --native-nftables -d 1000:2000\n\
                  run --native-nftables -c tap+\n\
                  nft list ruleset >$OUT/nothing\n\
                  run --native-nftables -i '10.0.0.0/8,' -x '2001:db8:1::5/48,,10.1.0.0/16' -k 'tap*' -d 1000-2000 \
                  --dual-stack\n\
                  nft -s list ruleset >$OUT/list\n";
    let mut pod = Pod::plain();
    pod.addresses.push("2001:db8::5/64".into());
    let out = pod.run(script, &[]);
    let err = read(&out, "err");
    if read(&out, "rc") != "1\n1\n1\n0\n" || !read(&out, "nothing").is_empty() {
        return Err(read(&out, "rc") + &err);
    }
    for wanted in [
        "netip.ParsePrefix(\" 10.1.0.0/16\"): ParseAddr(\" 10.1.0.0\"): unexpected character (at \" 10.1.0.0\")",
        "\"1000:2000\" for --istio-local-exclude-ports with --native-nftables: nft takes a range as 1000-2000",
        "\"tap+\" for --istio-exclude-interfaces with --native-nftables",
    ] {
        lacks("the error", &err, wanted)?;
    }
    let list = read(&out, "list");
    let excluded = "ip daddr 10.1.0.0/16 counter return\n\t\tip6 daddr 2001:db8:1::/48 counter return\n\
                    \t\tip daddr 10.0.0.0/8 counter jump istio-redirect\n";
    lacks("the listing", &list, excluded)?;
    lacks("the listing", &list, "tcp dport 1000-2000 counter return")?;
    lacks("the listing", &list, "iifname \"tap*\" counter return")
}
