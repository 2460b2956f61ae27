//! A command line as pflag reads it.
//!
//! Pod templates were written against istio-iptables, whose flags follow Go's pflag: the last of a repeated flag wins,
//! `--flag=value`, `--flag value`, `-p15001`, `-p=15001`, grouped short switches (`-nb '*'`), empty values, a switch
//! that takes `=false`, `--` as the end of flags, and arguments between flags, which are ignored.

use std::{collections::BTreeMap, time::Duration};

use crate::Error;

/// How a flag's value is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// A switch: no value means true.
    Switch,
    /// A number from 0 to 65535.
    U16,
    /// A Go duration such as `5s` or `1m30s`.
    Duration,
}

/// One flag of the command.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// The long name, without dashes.
    pub long: &'static str,
    /// The short name.
    pub short: Option<char>,
    /// How its value is read.
    pub kind: Kind,
    /// One line of help; empty for flags taken without effect.
    pub help: &'static str,
}

/// The values given, by long name.
pub type Values = BTreeMap<&'static str, String>;

/// Reads `args` (without the command's own name); checks every value against its flag's kind.
pub fn parse(flags: &[Flag], args: &[String]) -> Result<Values, Error> {
    let mut values = Values::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            break;
        }
        if let Some(long) = arg.strip_prefix("--") {
            long_flag(flags, long, &mut rest, &mut values)?;
        } else if arg.len() > 1 && arg.starts_with('-') {
            short_flags(flags, arg, &mut rest, &mut values)?;
        }
    }
    Ok(values)
}

fn long_flag<'a>(
    flags: &[Flag],
    text: &str,
    rest: &mut impl Iterator<Item = &'a String>,
    values: &mut Values,
) -> Result<(), Error> {
    if text.starts_with('-') || text.starts_with('=') {
        return Err(Error::Usage(format!("bad flag syntax: --{text}")));
    }
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_string())),
        None => (text, None),
    };
    let flag = flags
        .iter()
        .find(|f| f.long == name)
        .ok_or_else(|| Error::Usage(format!("unknown flag: --{name}")))?;
    let value = match value {
        Some(value) => value,
        None if flag.kind == Kind::Switch => "true".into(),
        None => rest
            .next()
            .cloned()
            .ok_or_else(|| Error::Usage(format!("flag needs an argument: --{name}")))?,
    };
    set(flag, value, values)
}

fn short_flags<'a>(
    flags: &[Flag],
    arg: &str,
    rest: &mut impl Iterator<Item = &'a String>,
    values: &mut Values,
) -> Result<(), Error> {
    let mut group = &arg[1..];
    while let Some(c) = group.chars().next() {
        let after = &group[c.len_utf8()..];
        let flag = flags
            .iter()
            .find(|f| f.short == Some(c))
            .ok_or_else(|| Error::Usage(format!("unknown shorthand flag: '{c}' in -{group}")))?;
        // pflag takes `=` as a separator only when something follows it.
        let value = match after.strip_prefix('=').filter(|v| !v.is_empty()) {
            Some(value) => value.to_string(),
            None if flag.kind == Kind::Switch => {
                set(flag, "true".into(), values)?;
                group = after;
                continue;
            }
            None if !after.is_empty() => after.to_string(),
            None => rest.next().cloned().ok_or_else(|| {
                Error::Usage(format!("flag needs an argument: '{c}' in -{group}"))
            })?,
        };
        return set(flag, value, values);
    }
    Ok(())
}

fn set(flag: &Flag, value: String, values: &mut Values) -> Result<(), Error> {
    if let Err(why) = check(flag.kind, &value) {
        let name = match flag.short {
            Some(c) => format!("-{c}, --{}", flag.long),
            None => format!("--{}", flag.long),
        };
        return Err(Error::Usage(format!(
            "invalid argument {value:?} for {name:?} flag: {why}"
        )));
    }
    values.insert(flag.long, value);
    Ok(())
}

/// Whether `value` can be read as `kind`; the error is Go's.
pub fn check(kind: Kind, value: &str) -> Result<(), String> {
    match kind {
        Kind::Text => Ok(()),
        Kind::Switch => switch(value).map(drop),
        Kind::U16 => number(value).map(drop),
        Kind::Duration => duration(value).map(drop),
    }
}

/// A truth value as Go's strconv.ParseBool reads it.
pub fn switch(value: &str) -> Result<bool, String> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!(
            "strconv.ParseBool: parsing {value:?}: invalid syntax"
        )),
    }
}

/// A port number; like Go's ParseUint with base 0, hexadecimal, octal and binary forms are read.
pub fn number(value: &str) -> Result<u16, String> {
    let lower = value.to_ascii_lowercase();
    let (digits, base) = match lower.get(..2) {
        Some("0x") => (&lower[2..], 16),
        Some("0b") => (&lower[2..], 2),
        Some("0o") => (&lower[2..], 8),
        _ if lower.len() > 1 && lower.starts_with('0') => (&lower[1..], 8),
        _ => (&lower[..], 10),
    };
    if digits.is_empty() || digits.starts_with('+') {
        return Err(format!(
            "strconv.ParseUint: parsing {value:?}: invalid syntax"
        ));
    }
    match u64::from_str_radix(digits, base) {
        Ok(n) => u16::try_from(n)
            .map_err(|_| format!("strconv.ParseUint: parsing {value:?}: value out of range")),
        Err(_) => Err(format!(
            "strconv.ParseUint: parsing {value:?}: invalid syntax"
        )),
    }
}

/// A Go duration; negative ones count as zero, as no timeout can be.
pub fn duration(value: &str) -> Result<Duration, String> {
    let invalid = || format!("time: invalid duration {value:?}");
    let (negative, mut rest) = match value.as_bytes().first() {
        Some(b'-') => (true, &value[1..]),
        Some(b'+') => (false, &value[1..]),
        _ => (false, value),
    };
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut seconds = 0f64;
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let figure: f64 = rest[..end].parse().map_err(|_| invalid())?;
        rest = &rest[end..];
        let end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "" => return Err(format!("time: missing unit in duration {value:?}")),
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            other => {
                return Err(format!(
                    "time: unknown unit {other:?} in duration {value:?}"
                ));
            }
        };
        seconds += figure * unit;
        rest = &rest[end..];
    }
    if negative {
        return Ok(Duration::ZERO);
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAGS: &[Flag] = &[
        Flag {
            long: "envoy-port",
            short: Some('p'),
            kind: Kind::Text,
            help: "",
        },
        Flag {
            long: "dry-run",
            short: Some('n'),
            kind: Kind::Switch,
            help: "",
        },
        Flag {
            long: "ports",
            short: Some('b'),
            kind: Kind::Text,
            help: "",
        },
        Flag {
            long: "probe",
            short: None,
            kind: Kind::U16,
            help: "",
        },
        Flag {
            long: "timeout",
            short: None,
            kind: Kind::Duration,
            help: "",
        },
    ];

    fn read(args: &[&str]) -> Result<Vec<(&'static str, String)>, String> {
        let args: Vec<String> = args.iter().map(|a| a.to_string()).collect();
        parse(FLAGS, &args)
            .map(|v| v.into_iter().collect())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn every_form_of_a_value_is_read() {
        for form in [
            &["-p", "1"][..],
            &["-p1"],
            &["-p=1"],
            &["--envoy-port=1"],
            &["--envoy-port", "1"],
            &["-p", "2", "word", "--envoy-port", "1"],
            &["-p1", "--", "-p2"],
        ] {
            assert_eq!(read(form), Ok(vec![("envoy-port", "1".into())]), "{form:?}");
        }
        assert_eq!(
            read(&["-nb", "*"]),
            Ok(vec![("dry-run", "true".into()), ("ports", "*".into())])
        );
        assert_eq!(read(&["-n=false"]), Ok(vec![("dry-run", "false".into())]));
        assert_eq!(read(&["-b", "", "-"]), Ok(vec![("ports", "".into())]));
        assert_eq!(read(&["-b", "-n"]), Ok(vec![("ports", "-n".into())]));
    }

    #[test]
    fn mistakes_are_named_in_the_words_of_pflag() {
        for (args, error) in [
            (&["--envy"][..], "unknown flag: --envy"),
            (&["-ny"], "unknown shorthand flag: 'y' in -y"),
            (&["--ports"], "flag needs an argument: --ports"),
            (&["-b"], "flag needs an argument: 'b' in -b"),
            (&["---x"], "bad flag syntax: ---x"),
            (
                &["--dry-run=maybe"],
                r#"invalid argument "maybe" for "-n, --dry-run" flag: strconv.ParseBool: parsing "maybe": invalid syntax"#,
            ),
            (
                &["--probe", "65536"],
                r#"invalid argument "65536" for "--probe" flag: strconv.ParseUint: parsing "65536": value out of range"#,
            ),
            (
                &["--timeout=5"],
                r#"invalid argument "5" for "--timeout" flag: time: missing unit in duration "5""#,
            ),
        ] {
            assert_eq!(read(args), Err(error.to_string()));
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        assert_eq!(duration("1m1.5s"), Ok(Duration::from_millis(61_500)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert!(duration("").is_err() && duration("5x").is_err());
    }
}
