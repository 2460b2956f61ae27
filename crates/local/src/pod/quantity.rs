//! Kubernetes' quantities (`100m`, `1Gi`), as far as `resourceFieldRef` and volume sizes need them.

/// The value in the base unit (cores, bytes).
pub(crate) fn parse(text: &str) -> Option<f64> {
    let text = text.trim();
    let split = text
        .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-')))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let factor = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024.0 * 1024.0,
        "Gi" => 1024f64.powi(3),
        "Ti" => 1024f64.powi(4),
        "Pi" => 1024f64.powi(5),
        "Ei" => 1024f64.powi(6),
        exponent if exponent.starts_with(['e', 'E']) => return text.parse().ok(),
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// The value in units of `divisor`, rounded up as the kubelet does.
pub(crate) fn divided(text: &str, divisor: &str) -> Option<u64> {
    let divisor = match divisor {
        "" | "0" => 1.0,
        d => parse(d)?,
    };
    // The tolerance undoes what binary fractions add: 0.1 / 0.001 is 100.00000000000001.
    Some((parse(text)? / divisor - 1e-9).ceil().max(0.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_divide_and_round_up() {
        assert_eq!(divided("2", "1"), Some(2));
        assert_eq!(divided("1500m", "1"), Some(2));
        assert_eq!(divided("100m", "1m"), Some(100));
        assert_eq!(divided("1Gi", "1"), Some(1 << 30));
        assert_eq!(divided("1Gi", "1Mi"), Some(1024));
        assert_eq!(divided("1e3", "0"), Some(1000));
        assert_eq!(divided("one", "1"), None);
    }
}
