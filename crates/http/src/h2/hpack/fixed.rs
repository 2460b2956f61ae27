//! The table that both sides know (RFC 7541, appendix A).

use super::Class;

/// One entry.
pub(super) struct Entry {
    pub(super) name: &'static str,
    pub(super) value: &'static str,
    pub(super) class: Class,
}

/// The entry of an index that a block says, which counts from one.
pub(super) fn get(index: usize) -> Option<&'static Entry> {
    ENTRIES.get(index.checked_sub(1)?)
}

/// The index of a field, as far as this table knows it.
pub(super) enum Found {
    /// Name and value.
    Field(u8),
    /// The name alone.
    Name(u8),
}

/// Looks for a field.
pub(super) fn find(name: &[u8], value: &[u8]) -> Option<Found> {
    let first = first(name)?;
    let same = ENTRIES[usize::from(first) - 1..]
        .iter()
        .take_while(|entry| entry.name.as_bytes() == name);
    for (at, entry) in same.enumerate() {
        if entry.value.as_bytes() == value && !value.is_empty() {
            return Some(Found::Field(first + at as u8));
        }
    }
    Some(Found::Name(first))
}

/// The first entry with this name.
fn first(name: &[u8]) -> Option<u8> {
    let near = BY_LENGTH.get(name.len())?;
    // Names of one length mostly differ in their first or last letter.
    let ends = (name.first(), name.last());
    near.iter()
        .copied()
        .take_while(|&index| index != 0)
        .find(|&index| {
            let known = ENTRIES[usize::from(index) - 1].name.as_bytes();
            (known.first(), known.last()) == ends && known == name
        })
}

/// How many entries there are; a connection's own follow.
pub(super) const COUNT: usize = 61;

/// The indexes of the names of each length, zeros behind.
static BY_LENGTH: [[u8; 9]; 28] = {
    let mut table = [[0; 9]; 28];
    let mut index = 1;
    while index <= COUNT {
        let name = ENTRIES[index - 1].name;
        if index == 1 || !same(name, ENTRIES[index - 2].name) {
            let mut at = 0;
            while table[name.len()][at] != 0 {
                at += 1;
            }
            table[name.len()][at] = index as u8;
        }
        index += 1;
    }
    table
};

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len() != b.len() {
        return false;
    }
    let mut at = 0;
    while at < a.len() {
        if a[at] != b[at] {
            return false;
        }
        at += 1;
    }
    true
}

const fn entry(name: &'static str, value: &'static str) -> Entry {
    entry_of(name, value, Class::Field)
}

const fn entry_of(name: &'static str, value: &'static str, class: Class) -> Entry {
    Entry { name, value, class }
}

static ENTRIES: [Entry; COUNT] = [
    entry_of(":authority", "", Class::Authority),
    entry_of(":method", "GET", Class::Method),
    entry_of(":method", "POST", Class::Method),
    entry_of(":path", "/", Class::Path),
    entry_of(":path", "/index.html", Class::Path),
    entry_of(":scheme", "http", Class::Scheme),
    entry_of(":scheme", "https", Class::Scheme),
    entry_of(":status", "200", Class::Status),
    entry_of(":status", "204", Class::Status),
    entry_of(":status", "206", Class::Status),
    entry_of(":status", "304", Class::Status),
    entry_of(":status", "400", Class::Status),
    entry_of(":status", "404", Class::Status),
    entry_of(":status", "500", Class::Status),
    entry("accept-charset", ""),
    entry("accept-encoding", "gzip, deflate"),
    entry("accept-language", ""),
    entry("accept-ranges", ""),
    entry("accept", ""),
    entry("access-control-allow-origin", ""),
    entry("age", ""),
    entry("allow", ""),
    entry("authorization", ""),
    entry("cache-control", ""),
    entry("content-disposition", ""),
    entry("content-encoding", ""),
    entry("content-language", ""),
    entry_of("content-length", "", Class::ContentLength),
    entry("content-location", ""),
    entry("content-range", ""),
    entry("content-type", ""),
    entry_of("cookie", "", Class::Cookie),
    entry("date", ""),
    entry("etag", ""),
    entry_of("expect", "", Class::Expect),
    entry("expires", ""),
    entry("from", ""),
    entry_of("host", "", Class::Host),
    entry("if-match", ""),
    entry("if-modified-since", ""),
    entry("if-none-match", ""),
    entry("if-range", ""),
    entry("if-unmodified-since", ""),
    entry("last-modified", ""),
    entry("link", ""),
    entry("location", ""),
    entry("max-forwards", ""),
    entry("proxy-authenticate", ""),
    entry("proxy-authorization", ""),
    entry("range", ""),
    entry("referer", ""),
    entry("refresh", ""),
    entry("retry-after", ""),
    entry("server", ""),
    entry("set-cookie", ""),
    entry("strict-transport-security", ""),
    entry_of("transfer-encoding", "", Class::Malformed),
    entry("user-agent", ""),
    entry("vary", ""),
    entry("via", ""),
    entry("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_found_again() {
        for index in 1..=COUNT {
            let entry = get(index).unwrap();
            let found = find(entry.name.as_bytes(), entry.value.as_bytes());
            match found {
                Some(Found::Field(found)) => assert_eq!(usize::from(found), index),
                Some(Found::Name(found)) => {
                    assert!(entry.value.is_empty());
                    assert_eq!(usize::from(found), index, "{}", entry.name);
                }
                None => panic!("{} is not found", entry.name),
            }
        }
        assert!(get(0).is_none() && get(62).is_none());
        assert!(find(b"x-other", b"").is_none());
        assert!(matches!(find(b":method", b"PUT"), Some(Found::Name(2))));
    }
}
