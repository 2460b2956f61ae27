use std::fs;

use super::*;
use crate::{Config, program};

#[path = "../../../testkit/src/conformance.rs"]
mod finder;

/// The pod of the picture: reviews at 172.17.0.20, its rules as Istio 1.5 wrote them.
fn picture() -> Ruleset {
    let config = Config {
        proxy_uid: "1337".into(),
        proxy_gid: "1337".into(),
        inbound_ports_include: "*".into(),
        inbound_ports_exclude: "15090,15020".into(),
        outbound_ip_ranges_include: "*".into(),
        rules_version: "1.5".into(),
        ..Config::default()
    };
    Ruleset::ours(&program::rules(&config).unwrap(), Family::V4)
}

fn packet(from: &str, to: &str) -> Packet {
    let to: std::net::SocketAddr = to.parse().unwrap();
    Packet {
        protocol: "tcp".into(),
        from: from.parse().unwrap(),
        from_port: None,
        to: to.ip(),
        to_port: to.port(),
        input: None,
        output: None,
        uid: None,
        gid: None,
        mark: 0,
        connection_mark: 0,
        state: State::New,
        own: vec!["172.17.0.20".parse().unwrap()],
    }
}

fn incoming(from: &str, to: &str) -> Packet {
    Packet {
        input: Some("eth0".into()),
        ..packet(from, to)
    }
}

fn outgoing(id: u32, by: &str, from: &str, to: &str) -> Packet {
    Packet {
        output: Some(by.into()),
        uid: Some(id),
        gid: Some(id),
        ..packet(from, to)
    }
}

/// Steps 1 to 16 of the picture, each a chain, a handler or the end of a way.
#[test]
fn the_sixteen_steps_of_a_request_through_a_pod() {
    let rules = picture();
    let pod = "172.17.0.20";
    let way = |packet: Packet| {
        let trace = walk(&rules, &packet);
        (trace.chains.join(" "), trace.end.to_string())
    };
    // 1 to 4: productpage calls; PREROUTING, ISTIO_INBOUND, ISTIO_IN_REDIRECT, the inbound handler.
    assert_eq!(
        way(incoming("172.17.0.15", "172.17.0.20:9080")),
        (
            "PREROUTING ISTIO_INBOUND ISTIO_IN_REDIRECT INPUT".into(),
            "local socket 172.17.0.20:15006 (the proxy, inbound); original destination 172.17.0.20:9080".into()
        )
    );
    // 5 to 8: the handler calls the app from 127.0.0.6; OUTPUT, ISTIO_OUTPUT (rule 1), POSTROUTING, the app.
    assert_eq!(
        way(outgoing(1337, "lo", "127.0.0.6", "172.17.0.20:9080")),
        (
            "OUTPUT ISTIO_OUTPUT POSTROUTING PREROUTING INPUT".into(),
            "local socket 172.17.0.20:9080".into()
        )
    );
    // 9 to 12: the app calls ratings; OUTPUT, ISTIO_OUTPUT (rule 9), ISTIO_REDIRECT, the outbound handler.
    assert_eq!(
        way(outgoing(1000, "eth0", pod, "10.96.7.7:9080")),
        (
            "OUTPUT ISTIO_OUTPUT ISTIO_REDIRECT POSTROUTING PREROUTING INPUT".into(),
            "local socket 127.0.0.1:15001 (the proxy, outbound); original destination 10.96.7.7:9080".into()
        )
    );
    // 13 to 15: the handler calls the chosen pod; OUTPUT, ISTIO_OUTPUT (rule 4), POSTROUTING and out.
    assert_eq!(
        way(outgoing(1337, "eth0", pod, "172.17.0.30:9080")),
        (
            "OUTPUT ISTIO_OUTPUT POSTROUTING".into(),
            "leaves by eth0 for 172.17.0.30:9080, untouched by the proxy".into()
        )
    );
    // 16: only where the chosen pod is this one; ISTIO_OUTPUT (rule 2) leads to ISTIO_IN_REDIRECT.
    assert_eq!(
        way(outgoing(1337, "lo", pod, "172.17.0.20:9080")),
        (
            "OUTPUT ISTIO_OUTPUT ISTIO_IN_REDIRECT POSTROUTING PREROUTING INPUT".into(),
            "local socket 127.0.0.1:15006 (the proxy, inbound); original destination 172.17.0.20:9080".into()
        )
    );
}

#[test]
fn the_story_names_each_rule_and_why_it_does_not_match() {
    let trace = walk(
        &picture(),
        &outgoing(1000, "eth0", "172.17.0.20", "10.96.7.7:9080"),
    );
    let expected = "\
packet: tcp 172.17.0.20 -> 10.96.7.7:9080, out by eth0, of user 1000 and group 1000
OUTPUT
  table nat, chain OUTPUT
     1  -p tcp -j ISTIO_OUTPUT
          matches
    table nat, chain ISTIO_OUTPUT
       1  -s 127.0.0.6/32 -o lo -j RETURN
            no: source 172.17.0.20 is not 127.0.0.6/32
       2  ! -d 127.0.0.1/32 -o lo -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
            no: out-interface eth0 is not lo
       3  -o lo -m owner ! --uid-owner 1337 -j RETURN
            no: out-interface eth0 is not lo
       4  -m owner --uid-owner 1337 -j RETURN
            no: user 1000 is not 1337
       5  ! -d 127.0.0.1/32 -o lo -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT
            no: out-interface eth0 is not lo
       6  -o lo -m owner ! --gid-owner 1337 -j RETURN
            no: out-interface eth0 is not lo
       7  -m owner --gid-owner 1337 -j RETURN
            no: group 1000 is not 1337
       8  -d 127.0.0.1/32 -j RETURN
            no: destination 10.96.7.7 is not 127.0.0.1/32
       9  -j ISTIO_REDIRECT
            matches
      table nat, chain ISTIO_REDIRECT
         1  -p tcp -j REDIRECT --to-ports 15001
              matches
            led to 127.0.0.1:15001
POSTROUTING
  no rules
comes back by lo
PREROUTING
  no rules
INPUT
  no rules
ends: local socket 127.0.0.1:15001 (the proxy, outbound); original destination 10.96.7.7:9080
";
    assert_eq!(trace.text, expected);
}

#[test]
fn transparent_capture_keeps_the_destination_and_marks_self_calls() {
    let config = Config {
        proxy_uid: "1337".into(),
        proxy_gid: "1337".into(),
        inbound_interception_mode: "TPROXY".into(),
        inbound_ports_include: "*".into(),
        outbound_ip_ranges_include: "*".into(),
        ..Config::default()
    };
    let rules = Ruleset::ours(&program::rules(&config).unwrap(), Family::V4);
    let end = |p: Packet| walk(&rules, &p).end.to_string();
    let captured =
        "transparent socket of port 15006 (the proxy, inbound); destination stays 172.17.0.20:80";
    assert_eq!(end(incoming("172.17.0.9", "172.17.0.20:80")), captured);
    // The proxy of this mode is root in group 1337.
    let mut own = outgoing(0, "lo", "172.17.0.20", "172.17.0.20:80");
    own.gid = Some(1337);
    assert_eq!(end(own), captured);
    // On behalf of a client, with the mark: straight to the app.
    let mut marked = outgoing(0, "lo", "172.17.0.9", "172.17.0.20:80");
    (marked.gid, marked.mark) = (Some(1337), 1337);
    assert_eq!(end(marked), "local socket 172.17.0.20:80");
    // A later packet of the client's connection.
    let mut later = incoming("172.17.0.9", "172.17.0.20:80");
    later.state = State::Established;
    assert!(walk(&rules, &later).chains.contains(&"ISTIO_DIVERT".into()));
}

#[test]
fn rules_of_others_are_judged_or_said_to_be_unknown() {
    let save = "*filter\n:INPUT DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n:F - [0:0]\n\
                -A INPUT -i eth+ -p tcp -m multiport --dports 80,8000:8100 -m comment --comment \"the \\\"web\\\" port\" -j F\n\
                -A INPUT -m statistic --mode random --probability 0.5 -j ACCEPT\n\
                -A F ! -s 10.0.0.0/8 -j REJECT --reject-with tcp-reset\n-A F -j ACCEPT\nCOMMIT\n";
    let rules = Ruleset::parse(save).unwrap();
    let trace = walk(&rules, &incoming("10.1.1.1", "172.17.0.20:8050"));
    assert_eq!(trace.end.to_string(), "local socket 172.17.0.20:8050");
    let trace = walk(&rules, &incoming("11.1.1.1", "172.17.0.20:8050"));
    assert_eq!(
        trace.end.to_string(),
        "dropped by REJECT in table filter, chain F"
    );
    let trace = walk(&rules, &incoming("10.1.1.1", "172.17.0.20:81"));
    assert_eq!(
        trace.end.to_string(),
        "dropped by the policy of table filter, chain INPUT"
    );
    assert!(trace.text.contains("cannot be judged: --mode random"));
    assert_eq!(trace.unknown, 1);
    let e = Ruleset::parse("*nat\nrubbish\n").unwrap_err().to_string();
    assert!(e.contains("line 2"), "{e}");
    assert!(Ruleset::parse("*nope\n").is_err() && Ruleset::parse("-A X -j Y\n").is_err());
}

/// One rule each, as Docker, kube-proxy and others write them: it acts, or it is said that nobody knows.
#[test]
fn what_is_not_known_is_never_taken_for_a_match() {
    let redirected = "local socket 172.17.0.20:15006 (the proxy, inbound); original destination 172.17.0.20:8080";
    let untouched = "local socket 172.17.0.20:8080";
    for (conditions, end, unknown) in [
        ("-p tcp -m socket", untouched, 1),
        ("-p tcp -m socket --transparent --nowildcard", untouched, 1),
        ("-p udp -m socket", untouched, 0),
        (
            "-m set --match-set KUBE-LOOP-BACK dst,dst,src",
            untouched,
            1,
        ),
        // What can be judged decides, wherever it stands.
        (
            "-m set ! --match-set x src -m tcp -p tcp --dport 81",
            untouched,
            0,
        ),
        (
            "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN",
            redirected,
            0,
        ),
        (
            "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN",
            untouched,
            0,
        ),
        ("-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK", untouched, 0),
        ("-m comment --comment -j -p tcp", redirected, 0),
        ("-m comment --comment \"to -j DROP\" -i eth0", redirected, 0),
        ("-p tcp -m multiport --ports 53,8080", redirected, 0),
        ("-p tcp -m multiport --ports 53,54", untouched, 1),
        ("-p tcp -m multiport ! --dports 53,8000:8079", redirected, 0),
        ("! -i docker0 -p tcp -m tcp --dport 8080", redirected, 0),
        ("-m addrtype --dst-type LOCAL", redirected, 0),
        ("-m addrtype --dst-type MULTICAST", untouched, 1),
        ("-m conntrack --ctstate RELATED,DNAT", untouched, 1),
        ("-m conntrack --ctstate NEW,DNAT", redirected, 0),
        ("-m owner --gid-owner 7 --suppl-groups", untouched, 1),
        ("-m owner --socket-exists", untouched, 0),
        ("-m mark --mark 0x4000/0x4000", untouched, 0),
        (
            "-m recent --rcheck --seconds 10 --name x --mask 255.255.255.255 --rsource",
            untouched,
            1,
        ),
        ("-m limit --limit 5/min", untouched, 1),
        ("-f", untouched, 1),
    ] {
        let save = format!(
            "*nat\n:PREROUTING ACCEPT [0:0]\n[7:420] -A PREROUTING {conditions} -j REDIRECT --to-ports 15006\nCOMMIT\n"
        );
        let rules = Ruleset::parse(&save).unwrap();
        let trace = walk(&rules, &incoming("10.1.1.1", "172.17.0.20:8080"));
        assert_eq!(
            (trace.end.to_string().as_str(), trace.unknown),
            (end, unknown),
            "{}",
            trace.text
        );
    }
}

#[test]
fn targets_do_what_they_do_or_are_said_to_be_unknown() {
    let own = "local socket 172.17.0.20:8080";
    let web = "local socket 172.17.0.20:80; original destination 172.17.0.20:8080";
    for (table, target, end, unknown) in [
        ("nat", "REDIRECT", own, 0),
        ("nat", "REDIRECT --to-ports 80-90", own, 1),
        ("nat", "DNAT --to-destination 172.17.0.20:80", web, 0),
        (
            "nat",
            "DNAT --to-destination 10.88.0.2:80",
            "forwarded to 10.88.0.2:80: it is not this pod's",
            0,
        ),
        ("nat", "DNAT --to-destination 10.88.0.2-10.88.0.9", own, 1),
        ("nat", "NETMAP --to 10.0.0.0/8", own, 1),
        ("mangle", "NFQUEUE --queue-num 0", own, 1),
        ("mangle", "QUEUE", own, 1),
        ("mangle", "SET --add-set seen src", own, 0),
        ("filter", "SYNPROXY --sack-perm", own, 1),
        ("filter", "TARPIT", own, 1),
        ("filter", "LOG --log-prefix \"-j DROP \"", own, 0),
    ] {
        let hook = if table == "filter" {
            "INPUT"
        } else {
            "PREROUTING"
        };
        let save =
            format!("*{table}\n:{hook} ACCEPT [0:0]\n-A {hook} -p tcp -j {target}\nCOMMIT\n");
        let rules = Ruleset::parse(&save).unwrap();
        let trace = walk(&rules, &incoming("10.1.1.1", "172.17.0.20:8080"));
        assert_eq!(
            (trace.end.to_string().as_str(), trace.unknown),
            (end, unknown),
            "{}",
            trace.text
        );
    }
}

#[test]
fn marks_move_by_their_masks_and_an_untracked_packet_is_not_translated() {
    let save = "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -s 10.9.9.9/32 -j CT --notrack\nCOMMIT\n\
                *mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j MARK --set-xmark 0x1234/0xffffffff\n\
                -A PREROUTING -j CONNMARK --set-xmark 0xf0000/0xf0000\n\
                -A PREROUTING -j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff\n\
                -A PREROUTING -m connmark --mark 0xf0034 -j MARK --set-xmark 0x0/0xffffffff\n\
                -A PREROUTING -m mark --mark 0x0 -j CONNMARK --restore-mark --nfmask 0xffff0000 --ctmask 0xf0000\n\
                -A PREROUTING -m conntrack --ctstate UNTRACKED -j RETURN\n\
                -A PREROUTING -m mark ! --mark 0xf0000 -j DROP\nCOMMIT\n\
                *nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT\n";
    let rules = Ruleset::parse(save).unwrap();
    let end = |from| {
        walk(&rules, &incoming(from, "172.17.0.20:80"))
            .end
            .to_string()
    };
    assert!(end("10.1.1.1").starts_with("local socket 172.17.0.20:15006"));
    assert_eq!(end("10.9.9.9"), "local socket 172.17.0.20:80");
}

#[test]
fn a_loop_of_chains_ends() {
    let save = "*nat\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n-A OUTPUT -j A\n-A A -j A\nCOMMIT\n";
    let rules = Ruleset::parse(save).unwrap();
    let trace = walk(&rules, &outgoing(1, "eth0", "172.17.0.20", "1.1.1.1:1"));
    assert!(trace.text.contains("too deep"));
}

/// Packets of every kind that a rule of Istio tells apart.
fn packets(family: Family) -> Vec<Packet> {
    let v4 = family == Family::V4;
    let (pod, passthrough) = if v4 {
        ("10.9.0.5", "127.0.0.6")
    } else {
        ("2001:db8::5", "::6")
    };
    let own = vec![pod.parse().unwrap()];
    let at = |ip: &str, port: u16| match v4 {
        true => format!("{ip}:{port}"),
        false => format!("[{ip}]:{port}"),
    };
    let base = |from: &str, to: &str| Packet {
        own: own.clone(),
        ..packet(from, to)
    };
    let elsewhere: &[&str] = match v4 {
        true => &[
            "10.96.7.7",
            "1.1.2.2",
            "9.9.9.9",
            "172.16.1.1",
            "192.168.1.1",
            "10.9.3.3",
        ],
        false => &["2001:db8:96::7", "2001:db8:1::9", "fd00::53", "fe00::1"],
    };
    let local: &[&str] = match v4 {
        true => &[pod, "127.0.0.1", "127.1.2.3", "127.0.0.53"],
        false => &[pod, "::1"],
    };
    let ports = [80, 53, 9080, 15008, 25008, 15020, 3306, 32000, 22];
    let owners = [
        (1000, 1000),
        (1337, 1337),
        (1000, 1337),
        (3, 1),
        (4, 2),
        (0, 777),
        (1000, 888),
    ];
    let owners = owners
        .into_iter()
        .chain([(1_000_670_000, 1_000_670_001), (1000, 202)]);
    let mut out = Vec::new();
    for (n, owner) in owners.enumerate() {
        let targets = elsewhere.iter().map(|ip| (*ip, "eth0"));
        for (m, (ip, by)) in targets
            .chain(local.iter().map(|ip| (*ip, "lo")))
            .enumerate()
        {
            // Not every port with everything: each with every owner and with every target.
            for port in ports
                .iter()
                .skip((n + m) % 3)
                .step_by(3)
                .copied()
                .chain([53])
            {
                let mut p = base(pod, &at(ip, port));
                (p.output, p.uid, p.gid) = (Some(by.into()), Some(owner.0), Some(owner.1));
                if port == 53 {
                    out.push(Packet {
                        protocol: "udp".into(),
                        ..p.clone()
                    });
                }
                if by == "lo" && owner.0 == 1337 {
                    out.push(Packet {
                        from: passthrough.parse().unwrap(),
                        ..p.clone()
                    });
                    out.push(Packet {
                        mark: 1337,
                        ..p.clone()
                    });
                }
                out.push(p);
            }
        }
    }
    let client = if v4 { "10.9.0.9" } else { "2001:db8::9" };
    for input in ["eth0", "eth1", "not-istio-nic", "lo"] {
        for port in ports.into_iter().chain([15090, 15021, 4000, 6000, 31000]) {
            let mut p = base(client, &at(pod, port));
            p.input = Some(input.into());
            for mark in [1337, 1338, 77] {
                out.push(Packet { mark, ..p.clone() });
            }
            for state in [State::Established, State::Invalid] {
                out.push(Packet { state, ..p.clone() });
            }
            out.push(Packet {
                from_port: Some(53),
                protocol: "udp".into(),
                ..p.clone()
            });
            out.push(Packet {
                from: passthrough.parse().unwrap(),
                ..p.clone()
            });
            out.push(Packet {
                to: elsewhere[0].parse().unwrap(),
                own: Vec::new(),
                ..p.clone()
            });
            out.push(p);
        }
    }
    // What the app answers to a client that the proxy called it for.
    let mut answer = base(pod, &at(client, 4321));
    (answer.output, answer.uid, answer.gid) = (Some("eth0".into()), Some(1000), Some(1000));
    for connection_mark in [1337, 77] {
        let state = State::Established;
        out.push(Packet {
            connection_mark,
            state,
            ..answer.clone()
        });
    }
    out
}

/// Every listing of nft that the real program leaves leads every packet where its rules of iptables do.
#[test]
fn rules_of_nft_end_where_those_of_iptables_do() {
    let Some(data) = finder::conformance("istio-iptables") else {
        return;
    };
    let (mut walked, mut cases, mut captured) = (0, 0, 0);
    for entry in fs::read_dir(data.join("nft-list")).unwrap() {
        let path = entry.unwrap().path();
        let case = path.file_stem().unwrap().to_string_lossy().into_owned();
        let listing = fs::read_to_string(&path).unwrap();
        if listing.is_empty() {
            continue;
        }
        cases += 1;
        for (family, name) in [(Family::V4, "v4"), (Family::V6, "v6")] {
            let save = data.join(format!("iptables-save/{case}.nft.{name}.save"));
            // Without rules of that family those of nft, which are for both, say more than those of iptables.
            let Ok(save) = fs::read_to_string(save) else {
                continue;
            };
            let iptables = Ruleset::parse(&save).unwrap();
            let nft = native::save(&listing, family).unwrap();
            let nft = Ruleset::parse(&nft).unwrap();
            for packet in packets(family) {
                // Istio's rule for nft drops invalid packets of TCP alone.
                if case == "drop-invalid"
                    && packet.state == State::Invalid
                    && packet.protocol != "tcp"
                {
                    continue;
                }
                let (there, here) = (walk(&iptables, &packet), walk(&nft, &packet));
                assert_eq!(here.unknown, 0, "{case}\n{}", here.text);
                assert_eq!(
                    there.end, here.end,
                    "{case}\niptables:\n{}\nnft:\n{}",
                    there.text, here.text
                );
                captured += usize::from(!matches!(&here.end, End::Leaves { .. }));
                walked += 1;
            }
        }
    }
    println!("{walked} packets through {cases} cases, {captured} stay in the pod");
    assert!(
        cases >= 39 && captured * 4 > walked,
        "{cases} cases, {captured} of {walked}"
    );
}
