//! The rules that `--native-nftables` wrote, as `nft -s list table` prints them, in the words of iptables: the walk
//! knows one language. Only what those tables hold is understood; any other word is refused by its line.

use crate::{Error, model::Family};

/// The form of `iptables-save` for one family.
pub(super) fn save(listing: &str, family: Family) -> Result<String, Error> {
    let mut out = String::new();
    let mut chain = String::new();
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table inet istio-proxy-") {
            end(&mut out);
            out.push_str(&format!("*{}\n", name.trim_end_matches(" {")));
        } else if let Some(name) = line.strip_prefix("chain ") {
            chain = iptables_name(name.trim_end_matches(" {"));
            out.push_str(&format!(":{chain} -\n"));
        } else if !matches!(line, "" | "}") && !line.starts_with("type ") {
            let unreadable = || {
                Error::Invalid(format!(
                    "a rule of nft cannot be read: {line:?} in {chain}; is it of somebody else? Give the flags of \
                     istio-iptables after -- to walk the rules without it"
                ))
            };
            if let Some(rule) = rule(line, family).ok_or_else(unreadable)? {
                out.push_str(&format!("-A {chain} {rule}\n"));
            }
        }
    }
    end(&mut out);
    Ok(out)
}

fn end(out: &mut String) {
    if !out.is_empty() {
        out.push_str("COMMIT\n");
    }
}

fn iptables_name(chain: &str) -> String {
    chain.to_uppercase().replace('-', "_")
}

/// One rule; inner none where it is of the other family, outer none where it cannot be read.
fn rule(line: &str, family: Family) -> Option<Option<String>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut rest = &words[..];
    let mut out: Vec<String> = Vec::new();
    let mut protocol = "";
    loop {
        let (taken, condition) = match rest {
            ["meta", "l4proto", name, ..] => (3, protocol_of(&mut protocol, name)),
            [name @ ("oifname" | "iifname"), ..] => {
                let (sense, value, used) = value(&rest[1..])?;
                let flag = if *name == "oifname" { "-o" } else { "-i" };
                (
                    1 + used,
                    // `tap*` is `tap+` there.
                    format!(
                        "{sense}{flag} {}",
                        value.trim_matches('"').replace('*', "+")
                    ),
                )
            }
            [version @ ("ip" | "ip6"), side @ ("saddr" | "daddr"), ..] => {
                if (*version == "ip") != (family == Family::V4) {
                    return Some(None);
                }
                let (sense, value, used) = value(&rest[2..])?;
                let flag = if *side == "saddr" { "-s" } else { "-d" };
                (2 + used, format!("{sense}{flag} {value}"))
            }
            [name @ ("tcp" | "udp"), side @ ("dport" | "sport"), ..] => {
                let (sense, value, used) = value(&rest[2..])?;
                let head = protocol_of(&mut protocol, name);
                let ports = value.replace('-', ":");
                let test = match ports.contains(',') {
                    true => format!("-m multiport {sense}--{side}s {ports}"),
                    false => format!("-m {name} {sense}--{side} {ports}"),
                };
                (2 + used, format!("{head} {test}").trim().to_owned())
            }
            ["meta", owner @ ("skuid" | "skgid"), ..] => {
                let (sense, value, used) = value(&rest[2..])?;
                let flag = if *owner == "skuid" { "uid" } else { "gid" };
                (2 + used, format!("-m owner {sense}--{flag}-owner {value}"))
            }
            ["ct", "state", states, ..] => {
                let list = states.to_uppercase();
                (3, format!("-m conntrack --ctstate {list}"))
            }
            ["meta", "mark", word, ..] if *word != "set" => {
                let (sense, value, used) = value(&rest[2..])?;
                (2 + used, format!("-m mark {sense}--mark {value}"))
            }
            ["ct", "mark", word, ..] if *word != "set" => (3, format!("-m connmark --mark {word}")),
            ["counter", "packets", _, "bytes", _, ..] => (5, String::new()),
            ["counter", ..] => (1, String::new()),
            _ => break,
        };
        if !condition.is_empty() {
            out.push(condition);
        }
        rest = &rest[taken..];
    }
    let target = match rest {
        ["return"] => "RETURN".into(),
        ["accept"] => "ACCEPT".into(),
        ["drop"] => "DROP".into(),
        ["jump", chain] => iptables_name(chain),
        ["redirect", "to", port] => format!("REDIRECT --to-ports {}", port.strip_prefix(':')?),
        ["meta", "mark", "set", "ct", "mark"] => "CONNMARK --restore-mark".into(),
        ["meta", "mark", "set", mark] => format!("MARK --set-xmark {mark}/0xffffffff"),
        ["ct", "mark", "set", "meta", "mark"] => "CONNMARK --save-mark".into(),
        ["ct", "zone", "set", zone] => format!("CT --zone {zone}"),
        [
            "tproxy",
            version,
            "to",
            port,
            "meta",
            "mark",
            "set",
            mark,
            "counter",
            ..,
            "accept",
        ]
        | [
            "tproxy",
            version,
            "to",
            port,
            "meta",
            "mark",
            "set",
            mark,
            "accept",
        ] => {
            if (*version == "ip") != (family == Family::V4) {
                return Some(None);
            }
            let port = port.strip_prefix(':')?;
            format!("TPROXY --on-port {port} --tproxy-mark {mark}/0xffffffff")
        }
        _ => return None,
    };
    out.push(format!("-j {target}"));
    Some(Some(out.join(" ")))
}

/// `-p`, once.
fn protocol_of<'a>(known: &mut &'a str, name: &'a str) -> String {
    match std::mem::replace(known, name) {
        "" => format!("-p {name}"),
        _ => String::new(),
    }
}

/// A value with the sense before it, and how many words both take. A set comes with commas.
fn value(words: &[&str]) -> Option<(&'static str, String, usize)> {
    let (sense, words, before) = match words {
        ["!=", rest @ ..] => ("! ", rest, 1),
        _ => ("", words, 0),
    };
    if words.first() != Some(&"{") {
        return Some((sense, (*words.first()?).to_owned(), before + 1));
    }
    let end = words.iter().position(|w| *w == "}")?;
    Some((sense, words[1..end].concat(), before + end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_come_back_in_the_words_of_iptables() {
        for (nft, iptables) in [
            (
                "oifname \"lo\" ip daddr != 127.0.0.1 tcp dport != { 53, 15008 } meta skuid 1337 counter packets 3 \
                 bytes 180 jump istio-in-redirect",
                "-o lo ! -d 127.0.0.1 -p tcp -m multiport ! --dports 53,15008 -m owner --uid-owner 1337 \
                 -j ISTIO_IN_REDIRECT",
            ),
            (
                "oifname \"lo\" meta l4proto tcp meta mark 0x00000539 counter return",
                "-o lo -p tcp -m mark --mark 0x00000539 -j RETURN",
            ),
            (
                "meta l4proto tcp ct state established,related counter jump istio-divert",
                "-p tcp -m conntrack --ctstate ESTABLISHED,RELATED -j ISTIO_DIVERT",
            ),
            (
                "meta l4proto tcp ip daddr != 127.0.0.1 tproxy ip to :15006 meta mark set 0x00000539 counter accept",
                "-p tcp ! -d 127.0.0.1 -j TPROXY --on-port 15006 --tproxy-mark 0x00000539/0xffffffff",
            ),
            (
                "udp sport 15053 meta skgid 1337 counter ct zone set 2",
                "-p udp -m udp --sport 15053 -m owner --gid-owner 1337 -j CT --zone 2",
            ),
            ("counter ct mark set meta mark", "-j CONNMARK --save-mark"),
            (
                "iifname \"tap*\" tcp dport 1000-2000 counter return",
                "-i tap+ -p tcp -m tcp --dport 1000:2000 -j RETURN",
            ),
        ] {
            assert_eq!(rule(nft, Family::V4), Some(Some(iptables.into())), "{nft}");
        }
        assert_eq!(rule("ip6 daddr ::1 counter return", Family::V4), Some(None));
        assert_eq!(rule("limit rate 5/second drop", Family::V4), None);
        assert_eq!(rule("tcp dport", Family::V4), None);
    }
}
