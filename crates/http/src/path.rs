//! One normal form of a path, for routing, policy, logs and the upstream alike.

use std::borrow::Cow;

/// What to do with `%2F`, `%2f`, `%5C` and `%5c` (Envoy's `path_with_escaped_slashes_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EscapedSlashes {
    /// Leave them.
    #[default]
    Keep,
    /// Answer 400.
    Reject,
    /// Unescape, and answer 307 to the new path if there was one.
    UnescapeAndRedirect,
    /// Unescape.
    UnescapeAndForward,
}

/// The rules of one listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PathRules {
    /// RFC 3986, 6: unreserved characters decoded, escapes in upper case, dot segments removed,
    /// `\` taken as `/`.
    pub normalize: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// See [`EscapedSlashes`].
    pub escaped_slashes: EscapedSlashes,
}

/// What [`PathRules::apply`] made of a path.
#[derive(Debug, PartialEq, Eq)]
pub enum Normalized<'a> {
    /// Go on with this path.
    Path(Cow<'a, str>),
    /// Send the client there.
    Redirect(String),
    /// Answer 400.
    Reject,
}

impl PathRules {
    /// Applies the rules to path and query; the query is left alone.
    pub fn apply<'a>(&self, path: &'a str) -> Normalized<'a> {
        if is_plain(path.as_bytes()) {
            return Normalized::Path(Cow::Borrowed(path));
        }
        let end = path.find(['?', '#']).unwrap_or(path.len());
        let (only, rest) = path.split_at(end);
        // `OPTIONS *`, CONNECT.
        if !only.starts_with('/') {
            return Normalized::Path(Cow::Borrowed(path));
        }
        let mut result = Cow::Borrowed(only);
        let mut redirect = false;
        if self.escaped_slashes != EscapedSlashes::Keep
            && let Some(unescaped) = unescape_slashes(&result)
        {
            if self.escaped_slashes == EscapedSlashes::Reject {
                return Normalized::Reject;
            }
            redirect = self.escaped_slashes == EscapedSlashes::UnescapeAndRedirect;
            result = Cow::Owned(unescaped);
        }
        if self.normalize && needs_normal_form(&result) {
            match normal_form(&result) {
                Some(normal) => result = Cow::Owned(normal),
                None => return Normalized::Reject,
            }
        }
        if self.merge_slashes && result.contains("//") {
            result = Cow::Owned(merge_slashes(&result));
        }
        if redirect {
            return Normalized::Redirect(format!("{result}{rest}"));
        }
        match result {
            Cow::Borrowed(_) => Normalized::Path(Cow::Borrowed(path)),
            Cow::Owned(mut changed) => {
                changed.push_str(rest);
                Normalized::Path(Cow::Owned(changed))
            }
        }
    }
}

/// Whether there is nothing in a path that any rule is about: letters, digits, single slashes.
fn is_plain(path: &[u8]) -> bool {
    let mut before = 0;
    path.iter().all(|&byte| {
        let plain = match byte {
            b'/' => before != b'/',
            b'.' => before != b'/',
            _ => byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'),
        };
        before = byte;
        plain
    })
}

fn unescape_slashes(path: &str) -> Option<String> {
    let lower = path.to_ascii_lowercase();
    if !lower.contains("%2f") && !lower.contains("%5c") {
        return None;
    }
    Some(
        path.replace("%2F", "/")
            .replace("%2f", "/")
            .replace("%5C", "\\")
            .replace("%5c", "\\"),
    )
}

fn needs_normal_form(path: &str) -> bool {
    path.contains(['%', '\\']) || path.contains(ESCAPED) || path.contains("/.")
}

/// What no path has but escaped (RFC 3986, 3.3); a policy that names the escape means the letter, too.
const ESCAPED: [char; 8] = ['"', '<', '>', '^', '`', '{', '|', '}'];

/// `None` where the path climbs above its root or an escape is not one.
fn normal_form(path: &str) -> Option<String> {
    let bytes = path.as_bytes();
    let mut decoded = String::with_capacity(path.len());
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        at += 1;
        if byte == b'\\' {
            decoded.push('/');
            continue;
        }
        if byte != b'%' {
            match char::from(byte) {
                letter if ESCAPED.contains(&letter) => {
                    decoded.push_str(&format!("%{byte:02X}"));
                }
                letter => decoded.push(letter),
            }
            continue;
        }
        let digit = |at: usize| {
            bytes
                .get(at)
                .and_then(|byte| char::from(*byte).to_digit(16))
        };
        let value = match (digit(at), digit(at + 1)) {
            (Some(high), Some(low)) => (high * 16 + low) as u8,
            _ => return None,
        };
        at += 2;
        match value {
            0 => return None,
            b'-' | b'.' | b'_' | b'~' => decoded.push(char::from(value)),
            value if value.is_ascii_alphanumeric() => decoded.push(char::from(value)),
            // As it is spelt: what a policy writes is compared with these letters, in Envoy too.
            _ => decoded.push_str(&path[at - 3..at]),
        }
    }
    let mut segments: Vec<&str> = Vec::new();
    let mut parts = decoded[1..].split('/').peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        // Some servers take what follows a semicolon off before they look for dots: for them `..;x` leads up, too.
        match part.split(';').next().unwrap_or_default() {
            "." if last => segments.push(""),
            "." => {}
            ".." => {
                segments.pop()?;
                if last {
                    segments.push("");
                }
            }
            _ => segments.push(part),
        }
    }
    Some(format!("/{}", segments.join("/")))
}

fn merge_slashes(path: &str) -> String {
    let mut merged = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !merged.ends_with('/') {
            merged.push(character);
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(escaped_slashes: EscapedSlashes) -> PathRules {
        PathRules {
            normalize: true,
            merge_slashes: true,
            escaped_slashes,
        }
    }

    fn path(rules: PathRules, path: &str) -> String {
        match rules.apply(path) {
            Normalized::Path(path) => path.into_owned(),
            Normalized::Redirect(to) => format!("redirect {to}"),
            Normalized::Reject => "reject".to_owned(),
        }
    }

    #[test]
    fn every_spelling_of_admin_is_one() {
        let forward = rules(EscapedSlashes::UnescapeAndForward);
        for spelling in [
            "/admin",
            "//admin",
            "/./admin",
            "/a/../admin",
            "/a/..%2fadmin",
            "/a%2F..%2Fadmin",
            "/%61dmin",
            "/x/%2e%2e/admin",
            "/x/..;/admin",
            "/x/..;a=b/admin",
            "/x/%2e%2E;/.;y/admin",
            "\\admin".replace('\\', "/").as_str(),
            "/%5cadmin",
        ] {
            assert_eq!(path(forward, spelling), "/admin", "{spelling}");
        }
        assert_eq!(path(forward, "/a%2f?b=%2f//c"), "/a/?b=%2f//c");
    }

    #[test]
    fn climbing_out_and_broken_escapes_are_refused() {
        let rules = rules(EscapedSlashes::Keep);
        for bad in ["/..", "/a/../../b", "/%2e%2e/", "/%zz", "/%0", "/a%00b"] {
            assert_eq!(path(rules, bad), "reject", "{bad}");
        }
    }

    #[test]
    fn escaped_slashes_follow_the_action() {
        assert_eq!(path(rules(EscapedSlashes::Keep), "/a%2fb"), "/a%2fb");
        assert_eq!(path(rules(EscapedSlashes::Keep), "/a%2F%3f"), "/a%2F%3f");
        assert_eq!(path(rules(EscapedSlashes::Reject), "/a%2fb"), "reject");
        assert_eq!(
            path(rules(EscapedSlashes::UnescapeAndRedirect), "/a%2Fb?c"),
            "redirect /a/b?c"
        );
        assert_eq!(path(PathRules::default(), "//a/../%2f"), "//a/../%2f");
    }

    #[test]
    fn letters_that_no_path_has_are_escaped() {
        let rules = rules(EscapedSlashes::Keep);
        assert_eq!(path(rules, "/a|b"), "/a%7Cb");
        assert_eq!(path(rules, "/\"<>^`{}?\"|"), "/%22%3C%3E%5E%60%7B%7D?\"|");
        assert_eq!(path(rules, "/[a]~'(b)*!$&+,;=:@"), "/[a]~'(b)*!$&+,;=:@");
        assert_eq!(path(PathRules::default(), "/a|b"), "/a|b");
    }
}
