//! What no case of the data shows: the self-test, repair, roll-back, refusals, older rules.

use super::*;

type Test = fn() -> Result<(), String>;

pub(super) const TESTS: &[(&str, Test)] = &[
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
