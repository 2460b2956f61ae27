//! What Istio takes in its messages beyond canonical JSON: durations as Go writes them (`100ms`, `1m30s`, `1.5h`).

use std::borrow::Cow;

use serde_json::Value;

/// A value for message `full_name` with every duration in canonical form (`1.5s`). What is no Go duration stays, for
/// the reader to refuse.
pub(crate) fn canonical_durations<'a>(full_name: &str, value: &'a Value) -> Cow<'a, Value> {
    let mut wanted = Vec::new();
    if let Some(descriptor) = proto::json::descriptor(full_name) {
        message(&descriptor, value, &mut Vec::new(), &mut wanted);
    }
    if wanted.is_empty() {
        return Cow::Borrowed(value);
    }
    let mut out = value.clone();
    for (path, text) in wanted {
        let mut at = Some(&mut out);
        for step in &path {
            at = at.and_then(|v| match step {
                Step::Key(k) => v.get_mut(*k),
                Step::Index(i) => v.get_mut(*i),
            });
        }
        if let Some(at) = at {
            *at = Value::String(text);
        }
    }
    Cow::Owned(out)
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

type Found<'a> = Vec<(Vec<Step<'a>>, String)>;

fn message<'a>(
    descriptor: &proto::json::MessageDescriptor,
    value: &'a Value,
    path: &mut Vec<Step<'a>>,
    found: &mut Found<'a>,
) {
    if descriptor.full_name() == "google.protobuf.Duration" {
        if let Value::String(text) = value
            && let Some(nanos) = duration_nanos(text)
        {
            let canonical = seconds_text(nanos);
            if canonical != *text {
                found.push((path.clone(), canonical));
            }
        }
        return;
    }
    if !descriptor.full_name().starts_with("istio.") {
        return;
    }
    let Value::Object(entries) = value else {
        return;
    };
    for (name, value) in entries {
        let Some(field) = descriptor
            .get_field_by_json_name(name)
            .or_else(|| descriptor.get_field_by_name(name))
        else {
            continue;
        };
        let kind = field.kind();
        let Some(inner) = kind.as_message() else {
            continue;
        };
        path.push(Step::Key(name));
        match value {
            Value::Object(entries) if field.is_map() => {
                let value_kind = inner.map_entry_value_field().kind();
                if let Some(inner) = value_kind.as_message() {
                    for (key, value) in entries {
                        path.push(Step::Key(key));
                        message(inner, value, path, found);
                        path.pop();
                    }
                }
            }
            Value::Array(items) if field.is_list() => {
                for (i, value) in items.iter().enumerate() {
                    path.push(Step::Index(i));
                    message(inner, value, path, found);
                    path.pop();
                }
            }
            _ => message(inner, value, path, found),
        }
        path.pop();
    }
}

/// Go's `time.ParseDuration`, in nanoseconds.
pub fn duration_nanos(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    let mut total: i128 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (whole, after) = rest.split_at(end);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => after.split_at(
                after
                    .find(|c: char| !c.is_ascii_digit())
                    .unwrap_or(after.len()),
            ),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit: i128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        if !whole.is_empty() {
            total = total.checked_add(whole.parse::<i128>().ok()?.checked_mul(unit)?)?;
        }
        // Digits below what 18 places hold have no weight next to a nanosecond.
        let fraction = &fraction[..fraction.len().min(18)];
        if !fraction.is_empty() {
            let scale = 10_i128.pow(u32::try_from(fraction.len()).ok()?);
            total = total.checked_add(fraction.parse::<i128>().ok()?.checked_mul(unit)? / scale)?;
        }
        rest = after;
    }
    i64::try_from(if negative { -total } else { total }).ok()
}

/// Nanoseconds in protobuf's form, as in `1.500s`.
fn seconds_text(nanos: i64) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    let (seconds, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    if rest == 0 {
        return format!("{sign}{seconds}s");
    }
    let fraction = format!("{rest:09}");
    format!("{sign}{seconds}.{}s", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn durations_of_go() {
        for (text, want) in [
            ("0", Some(0)),
            ("100ms", Some(100_000_000)),
            ("1m30s", Some(90_000_000_000)),
            ("1.5h", Some(5_400_000_000_000)),
            (".5s", Some(500_000_000)),
            ("-2us", Some(-2_000)),
            ("10", None),
            ("s", None),
            ("", None),
            ("1d", None),
            ("1s ", None),
        ] {
            assert_eq!(duration_nanos(text), want, "{text}");
        }
    }

    #[test]
    fn only_durations_change_and_only_in_istios_messages() {
        let value = json!({
            "hosts": ["10ms"],
            "http": [{"timeout": "1m", "fault": {"delay": {"fixedDelay": "100ms", "percentage": {"value": 5}}}, "retries": {"perTryTimeout": "2s"}}],
        });
        let read = canonical_durations("istio.networking.v1alpha3.VirtualService", &value);
        assert_eq!(read["http"][0]["timeout"], "60s");
        assert_eq!(read["http"][0]["fault"]["delay"]["fixedDelay"], "0.1s");
        assert_eq!(read["http"][0]["retries"]["perTryTimeout"], "2s");
        assert_eq!(read["hosts"][0], "10ms");
    }
}
