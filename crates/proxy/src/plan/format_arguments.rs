//! Arguments of operators that are small languages of their own.

use super::format::{self, DurationUnit, NameOrder, Operator, OperatorKind, Original, TimePoint};

/// `%COMMON_DURATION(FROM:TO:UNIT)%`. Envoy takes any other name for a point that an extension may set; nothing here sets
/// one, so it is rejected.
pub(super) fn common_duration(argument: &str) -> Result<OperatorKind, String> {
    let mut words = argument.split(':');
    let point = |word: Option<&str>| {
        Ok(match word {
            Some("DS_RX_BEG") => TimePoint::DownstreamReceivedFirst,
            Some("DS_RX_END") => TimePoint::DownstreamReceivedLast,
            Some("US_CX_BEG") => TimePoint::UpstreamConnectFirst,
            Some("US_CX_END") => TimePoint::UpstreamConnected,
            Some("US_HS_END") => TimePoint::UpstreamSecured,
            Some("DS_CX_BEG") => TimePoint::DownstreamConnected,
            Some("DS_CX_END") => TimePoint::DownstreamClosed,
            Some("DS_HS_END") => TimePoint::DownstreamSecured,
            Some("US_TX_BEG") => TimePoint::UpstreamSentFirst,
            Some("US_TX_END") => TimePoint::UpstreamSentLast,
            Some("US_RX_BEG") => TimePoint::UpstreamReceivedFirst,
            Some("US_RX_BODY_BEG") => TimePoint::UpstreamReceivedBody,
            Some("US_RX_END") => TimePoint::UpstreamReceivedLast,
            Some("DS_TX_BEG") => TimePoint::DownstreamSentFirst,
            Some("DS_TX_END") => TimePoint::DownstreamSentLast,
            other => {
                return Err(format!(
                    "`{}` is no point of time such as DS_RX_BEG, US_TX_END",
                    other.unwrap_or_default()
                ));
            }
        })
    };
    let (from, to) = (point(words.next())?, point(words.next())?);
    let unit = match words.next() {
        None | Some("ms") => DurationUnit::Milliseconds,
        Some("us") => DurationUnit::Microseconds,
        Some("ns") => DurationUnit::Nanoseconds,
        Some(other) => return Err(format!("`{other}` is none of ms, us, ns")),
    };
    if words.next().is_some() {
        return Err("takes two points of time and a unit".into());
    }
    Ok(OperatorKind::CommonDuration { from, to, unit })
}

/// `%REQUESTED_SERVER_NAME(SNI_ONLY|SNI_FIRST|HOST_FIRST:ORIG|HOST|ORIG_OR_HOST)%`.
pub(super) fn requested_server_name(argument: &str) -> Result<OperatorKind, String> {
    let mut words = argument.splitn(2, ':');
    let name = match words.next() {
        None | Some("" | "SNI_ONLY") => NameOrder::SniOnly,
        Some("SNI_FIRST") => NameOrder::SniFirst,
        Some("HOST_FIRST") => NameOrder::HostFirst,
        Some(other) => {
            return Err(format!(
                "`{other}` is none of SNI_ONLY, SNI_FIRST, HOST_FIRST"
            ));
        }
    };
    let host = match words.next() {
        None | Some("" | "ORIG_OR_HOST") => Original::OrPath,
        Some("HOST") => Original::Path,
        Some("ORIG") => Original::Only,
        Some(other) => return Err(format!("`{other}` is none of ORIG, HOST, ORIG_OR_HOST")),
    };
    Ok(OperatorKind::RequestedServerName { name, host })
}

/// `%COALESCE({"operators": […]})%`: names of operators, or objects with `command`, `param` and `max_length`.
pub(super) fn coalesce(argument: &str) -> Result<OperatorKind, String> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        operators: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Entry {
        Name(String),
        Full(Full),
    }
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Full {
        command: String,
        param: Option<String>,
        max_length: Option<usize>,
    }
    let config: Config = serde_json::from_str(argument)
        .map_err(|why| format!("needs {{\"operators\": [...]}} with names or objects: {why}"))?;
    if config.operators.is_empty() {
        return Err("needs at least one operator".into());
    }
    let operators = config.operators.into_iter().map(|entry| {
        let entry = match entry {
            Entry::Name(command) => Full {
                command,
                param: None,
                max_length: None,
            },
            Entry::Full(full) => full,
        };
        if entry.command == "COALESCE" {
            return Err("cannot hold itself".to_owned());
        }
        let kind = format::kind(&entry.command, entry.param.as_deref());
        Ok(Operator {
            kind: kind.map_err(|why| format!("{}: {why}", entry.command))?,
            max_length: entry.max_length,
        })
    });
    Ok(OperatorKind::Coalesce(operators.collect::<Result<_, _>>()?))
}

/// `%PATH(WQ|NQ:ORIG|PATH|ORIG_OR_PATH)%`.
pub(super) fn path(argument: &str) -> Result<OperatorKind, String> {
    let mut words = argument.splitn(2, ':');
    let without_query = match words.next() {
        None | Some("" | "WQ") => false,
        Some("NQ") => true,
        Some(other) => return Err(format!("`{other}` is neither WQ nor NQ")),
    };
    let original = match words.next() {
        None | Some("" | "ORIG_OR_PATH") => Original::OrPath,
        Some("PATH") => Original::Path,
        Some("ORIG") => Original::Only,
        Some(other) => return Err(format!("`{other}` is none of ORIG, PATH, ORIG_OR_PATH")),
    };
    Ok(OperatorKind::Path {
        without_query,
        original,
    })
}
