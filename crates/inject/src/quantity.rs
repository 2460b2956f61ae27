//! Kubernetes' quantities in their canonical form: `2000m` is printed `2`, `1024Mi` is printed `1Gi`.

/// The canonical form, or what is wrong with the text.
pub fn canonical(text: &str) -> Result<String, String> {
    let wrong = || {
        "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'".to_string()
    };
    let text = text.trim();
    let (sign, digits) = match text.as_bytes().first() {
        Some(b'-') => (-1i128, &text[1..]),
        Some(b'+') => (1, &text[1..]),
        _ => (1, text),
    };
    let end = digits
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return Err(wrong());
    }
    let (base, power, form) = scale(suffix).ok_or_else(wrong)?;
    // The value in billionths: `n`, the smallest suffix. What is smaller is rounded up, as Kubernetes does.
    let all: i128 = format!("{whole}{fraction}").parse().map_err(|_| wrong())?;
    let mut nanos = all.checked_mul(1_000_000_000).ok_or_else(wrong)?;
    let mut divisor = 10i128
        .checked_pow(fraction.len() as u32)
        .ok_or_else(wrong)?;
    if power >= 0 {
        let factor = i128::checked_pow(base, power as u32).ok_or_else(wrong)?;
        nanos = nanos.checked_mul(factor).ok_or_else(wrong)?;
    } else {
        let factor = i128::checked_pow(base, power.unsigned_abs()).ok_or_else(wrong)?;
        divisor = divisor.checked_mul(factor).ok_or_else(wrong)?;
    }
    let nanos = (nanos + divisor - 1) / divisor;
    let sign = if sign < 0 && nanos != 0 { "-" } else { "" };
    if form == Form::Binary && nanos >= 1024 * 1_000_000_000 {
        let (mut n, mut i) = ((nanos + 999_999_999) / 1_000_000_000, 0);
        while n % 1024 == 0 && i < 6 {
            (n, i) = (n / 1024, i + 1);
        }
        return Ok(format!(
            "{sign}{n}{}",
            ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][i]
        ));
    }
    if nanos == 0 {
        return Ok("0".into());
    }
    let (mut n, mut exponent) = (nanos, -9i32);
    while n % 1000 == 0 && exponent < 18 {
        (n, exponent) = (n / 1000, exponent + 3);
    }
    if form == Form::Exponent {
        return Ok(match exponent {
            0 => format!("{sign}{n}"),
            e => format!("{sign}{n}e{e}"),
        });
    }
    let suffixes = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
    Ok(format!(
        "{sign}{n}{}",
        suffixes[((exponent + 9) / 3) as usize]
    ))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Decimal,
    Binary,
    Exponent,
}

fn scale(suffix: &str) -> Option<(i128, i32, Form)> {
    let decimal = |power| Some((10, power, Form::Decimal));
    let binary = |power| Some((1024, power, Form::Binary));
    match suffix {
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let power: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            (-18..=18)
                .contains(&power)
                .then_some((10, power, Form::Exponent))
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn quantities_are_printed_as_kubernetes_prints_them() {
        for (text, canonical) in [
            ("2000m", "2"),
            ("1024Mi", "1Gi"),
            ("0.5", "500m"),
            ("1500m", "1500m"),
            ("1000", "1k"),
            ("1024", "1024"),
            ("0.5Gi", "512Mi"),
            ("1.5Gi", "1536Mi"),
            ("100Ki", "100Ki"),
            ("512", "512"),
            ("0", "0"),
            ("0Mi", "0"),
            ("1e3", "1e3"),
            ("-100m", "-100m"),
            ("0.1n", "1n"),
        ] {
            assert_eq!(super::canonical(text), Ok(canonical.to_string()), "{text}");
        }
        for text in ["", "x", "1x", "1.2.3", "Mi"] {
            assert!(super::canonical(text).is_err(), "{text}");
        }
    }
}
