//! Whether the kernel holds our rules of nft, in order: its listing against what was written.
//!
//! nft prints a rule otherwise than it was given: marks in sixteen digits, addresses without their full length, sets and
//! states in an order of its own, names as numbers. Both sides are brought into one form.

use std::collections::BTreeMap;

use base::cidr::Cidr;

use super::{TABLES, chains, line, own};
use crate::{
    Error,
    model::{Rule, Table},
    state, surroundings,
};

/// How this network namespace differs from `rules`, a sentence each.
pub fn verify(rules: &[Rule]) -> Result<Vec<String>, Error> {
    Ok(differences(&super::listing()?.unwrap_or_default(), rules))
}

/// How a listing differs from `rules`.
pub(crate) fn differences(listing: &str, rules: &[Rule]) -> Vec<String> {
    let found = read(listing);
    let mut out = Vec::new();
    for (table, _) in TABLES {
        let should: BTreeMap<String, Vec<String>> = chains(rules, table)
            .into_iter()
            .map(|(chain, rules)| {
                let rules = rules.iter().map(|r| canonical(&line(r))).collect();
                (own(chain), rules)
            })
            .collect();
        let none = BTreeMap::new();
        let there = found.get(&table).unwrap_or(&none);
        for (chain, rules) in &should {
            match there.get(chain) {
                Some(found) => state::compare(table, chain, found, rules, &mut out),
                None => out.push(format!("table {table}: chain {chain} is missing")),
            }
        }
        for chain in there.keys().filter(|c| !should.contains_key(*c)) {
            out.push(format!("table {table}: chain {chain} should not be there"));
        }
    }
    out
}

/// Rules by table and chain.
fn read(listing: &str) -> BTreeMap<Table, BTreeMap<String, Vec<String>>> {
    let mut out: BTreeMap<Table, BTreeMap<String, Vec<String>>> = BTreeMap::new();
    let (mut table, mut chain) = (None, String::new());
    for text in listing.lines().map(str::trim) {
        if let Some(name) = text.strip_prefix("table inet ") {
            let name = name.trim_end_matches(" {");
            table = TABLES.iter().find(|(_, n)| *n == name).map(|(t, _)| *t);
            continue;
        }
        let Some(table) = table else { continue };
        if let Some(name) = text.strip_prefix("chain ") {
            chain = name.trim_end_matches(" {").to_owned();
            out.entry(table)
                .or_default()
                .entry(chain.clone())
                .or_default();
        } else if !matches!(text, "" | "}") && !text.starts_with("type ") {
            let chains = out.entry(table).or_default();
            let rules = chains.entry(chain.clone()).or_default();
            rules.push(canonical(text));
        }
    }
    out
}

/// One form for what means the same.
fn canonical(rule: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    // Where the elements of a set begin.
    let mut set = None;
    let mut protocol = "tcp";
    for word in rule.split_whitespace() {
        let word = word.trim_matches('"').trim_end_matches(',');
        let last = |n: usize| words.len().checked_sub(n).map(|at| words[at].as_str());
        let text = match word {
            "{" => {
                set = Some(words.len() + 1);
                word.to_owned()
            }
            "}" => {
                if let Some(first) = set.take() {
                    words[first..].sort();
                }
                word.to_owned()
            }
            "tcp" | "udp" => {
                protocol = if word == "udp" { "udp" } else { "tcp" };
                word.to_owned()
            }
            // `ct mark set mark` is short for `ct mark set meta mark`.
            "mark" if last(1) == Some("set") => {
                words.push("meta".into());
                word.to_owned()
            }
            _ => match (last(2), last(1)) {
                (_, Some("state")) => {
                    let mut states: Vec<&str> = word.split(',').collect();
                    states.sort_unstable();
                    states.join(",")
                }
                _ => value(word, protocol, &words),
            },
        };
        words.push(text);
    }
    words.join(" ")
}

/// A value, told by what stands before it.
fn value(word: &str, protocol: &str, before: &[String]) -> String {
    if let Some(digits) = word.strip_prefix("0x")
        && let Ok(number) = u32::from_str_radix(digits, 16)
    {
        return number.to_string();
    }
    let mut before = before.iter().rev().map(String::as_str);
    let about =
        before.find(|w| !matches!(*w, "!=" | "{") && !w.starts_with(|c: char| c.is_ascii_digit()));
    let found = match about {
        Some("saddr" | "daddr") => match (Cidr::parse(word), word.parse()) {
            (Ok(range), _) => Some(range.masked().to_string()),
            (_, Ok(ip)) => Some(Cidr::host(ip).to_string()),
            _ => None,
        },
        Some("dport" | "sport") => surroundings::port(word, protocol).map(|p| p.to_string()),
        Some("skuid") => surroundings::user_id(word),
        Some("skgid") => surroundings::group_id(word),
        _ => None,
    };
    found.unwrap_or_else(|| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_and_what_is_listed_have_one_form() {
        for (written, listed) in [
            (
                "oifname \"lo\" ip daddr != 127.0.0.1/32 tcp dport != { 53, 15008 } meta skuid 1337 counter jump x",
                "oifname \"lo\" ip daddr != 127.0.0.1 tcp dport != { 15008, 53 } meta skuid 1337 counter jump x",
            ),
            (
                "meta l4proto tcp ct state related,established counter jump istio-divert",
                "meta l4proto tcp ct state established,related counter jump istio-divert",
            ),
            (
                "ip daddr 172.16.5.9/12 counter return",
                "ip daddr 172.16.0.0/12 counter return",
            ),
            (
                "meta l4proto tcp meta mark 1337 counter ct mark set mark",
                "meta l4proto tcp meta mark 0x00000539 counter ct mark set meta mark",
            ),
            (
                "tcp dport http counter return",
                "tcp dport 80 counter return",
            ),
        ] {
            assert_eq!(canonical(written), canonical(listed));
        }
        assert_ne!(
            canonical("ip daddr 10.0.0.0/8 counter return"),
            canonical("ip daddr 10.0.0.0/9 counter return")
        );
    }
}
