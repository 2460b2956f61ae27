//! Times as log lines print them.

use std::{
    cell::Cell,
    io::Write,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::plan::format::TimeFormat;

/// Writes a time, in UTC unless its form says otherwise.
pub(super) fn write(format: &TimeFormat, time: SystemTime, out: &mut Vec<u8>) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    match format {
        TimeFormat::Rfc3339Millis => {
            // Lines of one second share their first nineteen characters.
            let seconds = since.as_secs();
            let (known, mut text) = LAST.get();
            if known != seconds || text[0] == 0 {
                let stamp = jiff::Timestamp::from_second(seconds as i64).unwrap_or_default();
                let _ = write!(&mut text[..], "{}", stamp.strftime("%Y-%m-%dT%H:%M:%S"));
                LAST.set((seconds, text));
            }
            out.extend_from_slice(&text);
            let _ = write!(out, ".{:03}Z", since.subsec_millis());
        }
        TimeFormat::Local(format) => {
            let zone = jiff::tz::TimeZone::system();
            let stamp = jiff::Timestamp::from_second(since.as_secs() as i64)
                .unwrap_or_default()
                .to_zoned(zone);
            let format = match &**format {
                "" => "%Y-%m-%dT%H:%M:%S.%3f%:z",
                format => format,
            };
            let format = fractions(format, since.as_secs(), since.subsec_nanos());
            let _ = write!(out, "{}", stamp.strftime(&format));
        }
        TimeFormat::Strftime(format) => {
            let stamp = jiff::Timestamp::from_second(since.as_secs() as i64).unwrap_or_default();
            let format = fractions(format, since.as_secs(), since.subsec_nanos());
            let _ = write!(
                out,
                "{}",
                stamp.to_zoned(jiff::tz::TimeZone::UTC).strftime(&format)
            );
        }
    }
}

/// Replaces Envoy's own specifiers: `%f` (nine digits), `%3f`, `%s` and `%3s`.
fn fractions(format: &str, seconds: u64, nanos: u32) -> String {
    let mut out = String::with_capacity(format.len() + 16);
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let bytes = rest.as_bytes();
        let (digits, kind, length) = match bytes {
            [_, digit @ b'1'..=b'9', kind @ (b'f' | b's'), ..] => {
                (usize::from(digit - b'0'), *kind, 3)
            }
            [_, b'f', ..] => (9, b'f', 2),
            [_, b's', ..] => (0, b's', 2),
            _ => {
                let end = rest.char_indices().nth(2).map_or(rest.len(), |(at, _)| at);
                out.push_str(&rest[..end]);
                rest = &rest[end..];
                continue;
            }
        };
        let fraction = format!("{nanos:09}");
        if kind == b's' {
            out.push_str(&seconds.to_string());
        }
        out.push_str(&fraction[..digits]);
        rest = &rest[length..];
    }
    out.push_str(rest);
    out
}

thread_local! {
    static LAST: Cell<(u64, [u8; 19])> = const { Cell::new((0, [0; 19])) };
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_printed_as_envoy_does() {
        let time = UNIX_EPOCH + Duration::from_millis(1_700_000_000_042);
        let print = |format: &TimeFormat| {
            let mut out = Vec::new();
            write(format, time, &mut out);
            String::from_utf8(out).expect("times are text")
        };
        assert_eq!(
            print(&TimeFormat::Rfc3339Millis),
            "2023-11-14T22:13:20.042Z"
        );
        let strftime = |text: &str| print(&TimeFormat::Strftime(text.into()));
        assert_eq!(
            strftime("%Y/%m/%d %3f %s %3s %f"),
            "2023/11/14 042 1700000000 1700000000042 042000000"
        );
    }
}
