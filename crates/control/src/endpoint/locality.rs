//! Matching places against the patterns of a rule.

use proto::envoy::config::core::v3::Locality;

use crate::model::endpoint::split_locality;

/// Whether `locality` is one that `pattern` (`region/zone/subzone`, `*` for any, shorter for all below) means.
pub(crate) fn locality_match(locality: &Locality, pattern: &str) -> bool {
    let (region, zone, subzone) = split_locality(pattern);
    let fits =
        |pattern: &str, value: &str| pattern == "*" || pattern.is_empty() || pattern == value;
    (region == "*" || region == locality.region)
        && fits(zone, &locality.zone)
        && fits(subzone, &locality.sub_zone)
}

/// How far away `other` is: 0 the same subzone, 1 the same zone, 2 the same region, 3 elsewhere.
pub(super) fn distance(here: &Locality, other: &Locality) -> u32 {
    if here.region != other.region {
        3
    } else if here.zone != other.zone {
        2
    } else if here.sub_zone != other.sub_zone {
        1
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::proxy::locality_from_text;

    #[test]
    fn patterns_match_places() {
        let place = locality_from_text("eu/eu-1/a");
        for pattern in [
            "eu",
            "eu/*",
            "eu/eu-1",
            "eu/eu-1/*",
            "eu/eu-1/a",
            "*",
            "*/eu-1",
        ] {
            assert!(locality_match(&place, pattern), "{pattern}");
        }
        for pattern in ["us", "eu/eu-2", "eu/eu-1/b"] {
            assert!(!locality_match(&place, pattern), "{pattern}");
        }
        assert_eq!(distance(&place, &locality_from_text("eu/eu-1/b")), 1);
        assert_eq!(distance(&place, &locality_from_text("us")), 3);
    }
}
