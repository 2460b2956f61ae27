//! Regular expressions with RE2's meaning, on the `regex` crate's linear-time engine.
//!
//! Both engines never backtrack, but they read some patterns differently. A pattern is translated before it is
//! compiled: `\d \w \s \b` are ASCII, `\Q…\E` and escaped punctuation are literal, class set operations and nested
//! classes do not exist, a `{` that opens no repetition is itself; what RE2 refuses is refused (`\C`, a repetition of
//! more than 1000, a repetition of a repetition, flags other than `imsU`, escapes it does not know).

use std::fmt;

use regex::bytes::{Regex as Engine, RegexBuilder};

/// A compiled expression. Two are equal when their texts are.
#[derive(Clone)]
pub struct Regex {
    text: Box<str>,
    /// Anchored at both ends.
    full: Engine,
    /// Not anchored, for rewrites and stat tags; compiled at first use.
    search: std::sync::OnceLock<Engine>,
}

impl Regex {
    /// Compiles RE2 syntax.
    ///
    /// # Errors
    /// The reason in one line, for the user who wrote it.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.len() > MAX_LENGTH {
            return Err(format!(
                "is {} bytes long; at most {MAX_LENGTH} are taken",
                text.len()
            ));
        }
        let translated = translate(text)?;
        let full = build(&format!(r"\A(?:{translated})\z"))?;
        Ok(Self {
            text: text.into(),
            full,
            search: std::sync::OnceLock::new(),
        })
    }

    /// Whether the whole text matches.
    pub fn is_match(&self, text: &[u8]) -> bool {
        self.full.is_match(text)
    }

    /// The groups of a match with the whole text.
    pub fn captures<'t>(&self, text: &'t [u8]) -> Option<regex::bytes::Captures<'t>> {
        self.full.captures(text)
    }

    /// The expression without anchors.
    pub fn search(&self) -> &Engine {
        self.search.get_or_init(|| {
            let translated = translate(&self.text).expect("translated when it was made");
            build(&translated).expect("compiled with anchors when it was made")
        })
    }

    /// As configured.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialEq for Regex {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Regex {}

impl fmt::Debug for Regex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

/// Longer patterns are mistakes or attacks.
const MAX_LENGTH: usize = 16 << 10;
/// Limit of a compiled program in bytes.
const SIZE_LIMIT: usize = 4 << 20;
/// RE2's own limit of a counted repetition.
const MAX_REPEAT: u32 = 1000;

fn build(pattern: &str) -> Result<Engine, String> {
    RegexBuilder::new(pattern)
        .size_limit(SIZE_LIMIT)
        .build()
        .map_err(|e| match e {
            regex::Error::CompiledTooBig(_) => "is too large once compiled".to_owned(),
            // The engine's message is a drawing over several lines whose last one is the reason.
            other => {
                let text = other.to_string();
                let reason = text.lines().next_back().unwrap_or("cannot be compiled");
                reason.trim_start_matches("error: ").to_owned()
            }
        })
}

/// RE2 syntax in the syntax of the `regex` crate.
fn translate(text: &str) -> Result<String, String> {
    let mut reader = Reader {
        chars: text.chars().collect(),
        at: 0,
        out: String::new(),
    };
    // Whether the last thing was a repetition, which RE2 lets nothing repeat.
    let mut repeated = false;
    while let Some(c) = reader.next() {
        let was_repeated = std::mem::replace(&mut repeated, false);
        match c {
            '\\' => reader.escape(false)?,
            '[' => reader.class()?,
            '(' => reader.group()?,
            '*' | '+' | '?' => {
                if was_repeated {
                    return Err(format!("repeats a repetition with `{c}`"));
                }
                reader.out.push(c);
                reader.lazy();
                repeated = true;
            }
            '{' => match reader.counted()? {
                Some(counted) => {
                    if was_repeated {
                        return Err("repeats a repetition with `{`".into());
                    }
                    reader.out.push_str(&counted);
                    reader.lazy();
                    repeated = true;
                }
                None => reader.out.push_str(r"\{"),
            },
            '}' | ']' => {
                reader.out.push('\\');
                reader.out.push(c);
            }
            _ => reader.out.push(c),
        }
    }
    Ok(reader.out)
}

struct Reader {
    chars: Vec<char>,
    at: usize,
    out: String,
}

impl Reader {
    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn rest_starts_with(&self, text: &str) -> bool {
        text.chars()
            .enumerate()
            .all(|(i, c)| self.chars.get(self.at + i) == Some(&c))
    }

    fn lazy(&mut self) {
        if self.peek() == Some('?') {
            self.at += 1;
            self.out.push('?');
        }
    }

    fn literal(&mut self, c: char) {
        // `\<` and `\>` would be word boundaries.
        if c.is_ascii_punctuation() && !matches!(c, '<' | '>') {
            self.out.push('\\');
        }
        self.out.push(c);
    }

    /// After a backslash.
    fn escape(&mut self, in_class: bool) -> Result<(), String> {
        let Some(c) = self.next() else {
            return Err("ends with a backslash".into());
        };
        // Bodies of Perl's classes in ASCII; inside a class a negated one becomes a nested class.
        let perl = |body: &str, negated: bool| match (in_class, negated) {
            (true, false) => body.to_owned(),
            (_, true) => format!("[^{body}]"),
            (false, false) => format!("[{body}]"),
        };
        match c {
            'd' | 'D' => self.out.push_str(&perl("0-9", c == 'D')),
            'w' | 'W' => self.out.push_str(&perl("0-9A-Za-z_", c == 'W')),
            's' | 'S' => self.out.push_str(&perl(r"\t\n\x0C\r ", c == 'S')),
            'b' | 'B' if !in_class => self.out.push_str(&format!(r"(?-u:\{c})")),
            'A' | 'z' if !in_class => self.out.push_str(&format!(r"\{c}")),
            'Q' => {
                while !self.rest_starts_with(r"\E") {
                    let Some(c) = self.next() else { return Ok(()) };
                    self.literal(c);
                }
                self.at += 2;
            }
            'E' if !in_class => {}
            'a' | 'f' | 't' | 'n' | 'r' | 'v' => self.out.push_str(&format!(r"\{c}")),
            'p' | 'P' => {
                self.out.push('\\');
                self.out.push(c);
                match self.next() {
                    Some('{') => {
                        self.out.push('{');
                        while let Some(c) = self.next() {
                            self.out.push(c);
                            if c == '}' {
                                break;
                            }
                        }
                    }
                    Some(c) => self.out.push(c),
                    None => return Err(format!(r"ends within \{c}")),
                }
            }
            'x' => {
                self.out.push_str(r"\x");
                if self.peek() == Some('{') {
                    while let Some(c) = self.next() {
                        self.out.push(c);
                        if c == '}' {
                            break;
                        }
                    }
                }
            }
            '0'..='7' => {
                let mut code = c.to_digit(8).unwrap_or(0);
                let mut digits = 1;
                while digits < 3 {
                    let Some(digit) = self.peek().and_then(|c| c.to_digit(8)) else {
                        break;
                    };
                    code = code * 8 + digit;
                    self.at += 1;
                    digits += 1;
                }
                if c != '0' && digits == 1 {
                    return Err(format!(
                        r"refers back to a group with \{c}, which RE2 does not do"
                    ));
                }
                self.out.push_str(&format!(r"\x{{{code:X}}}"));
            }
            c if c.is_ascii_punctuation() => self.literal(c),
            c => return Err(format!(r"has the unknown escape \{c}")),
        }
        Ok(())
    }

    /// After `[`.
    fn class(&mut self) -> Result<(), String> {
        self.out.push('[');
        if self.peek() == Some('^') {
            self.at += 1;
            self.out.push('^');
        }
        let mut first = true;
        loop {
            let Some(c) = self.next() else {
                return Err("has a `[` without its `]`".into());
            };
            match c {
                ']' if !first => {
                    self.out.push(']');
                    return Ok(());
                }
                '[' if self.peek() == Some(':') => {
                    let end = (self.at + 1..self.chars.len().saturating_sub(1))
                        .find(|i| self.chars[*i] == ':' && self.chars[*i + 1] == ']');
                    let Some(end) = end else {
                        self.out.push_str(r"\[");
                        first = false;
                        continue;
                    };
                    self.out.push('[');
                    self.out.extend(&self.chars[self.at..end + 2]);
                    self.at = end + 2;
                }
                '\\' => self.escape(true)?,
                // A dash at an end is itself; elsewhere it makes a range. Two in a row would be a set operation.
                '-' if !first && self.peek() != Some(']') && !self.out.ends_with('-') => {
                    self.out.push('-');
                    if self.peek() == Some('-') {
                        self.at += 1;
                        self.out.push_str(r"\-");
                    }
                }
                c if c.is_ascii_punctuation() => self.literal(c),
                c => self.out.push(c),
            }
            first = false;
        }
    }

    /// After `(`.
    fn group(&mut self) -> Result<(), String> {
        self.out.push('(');
        if self.peek() != Some('?') {
            return Ok(());
        }
        self.at += 1;
        self.out.push('?');
        if self.rest_starts_with("P<") || self.rest_starts_with("<") {
            return Ok(());
        }
        while let Some(c) = self.next() {
            self.out.push(c);
            match c {
                ':' | ')' => return Ok(()),
                'i' | 'm' | 's' | 'U' | '-' => {}
                c => return Err(format!("has the unknown group flag `{c}`")),
            }
        }
        Err("has a `(` without its `)`".into())
    }

    /// After `{`: a counted repetition, or nothing when the brace is itself.
    fn counted(&mut self) -> Result<Option<String>, String> {
        let Some(length) = self.chars[self.at..].iter().position(|c| *c == '}') else {
            return Ok(None);
        };
        let body: String = self.chars[self.at..self.at + length].iter().collect();
        let (low, high) = body.split_once(',').unwrap_or((&body, &body));
        let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()) && !text.is_empty();
        if !number(low) || !(number(high) || (high.is_empty() && body.contains(','))) {
            return Ok(None);
        }
        for count in [low, high].into_iter().filter(|t| !t.is_empty()) {
            if count.parse::<u32>().map_or(true, |n| n > MAX_REPEAT) {
                return Err(format!(
                    "repeats {count} times; RE2 takes at most {MAX_REPEAT}"
                ));
            }
        }
        self.at += length + 1;
        Ok(Some(format!("{{{body}}}")))
    }
}

#[cfg(test)]
mod tests {
    use super::Regex;

    fn matches(pattern: &str, text: &str) -> bool {
        Regex::new(pattern)
            .expect(pattern)
            .is_match(text.as_bytes())
    }

    #[test]
    fn whole_text_must_match() {
        assert!(matches("/a|/b", "/a") && matches("/a|/b", "/b"));
        assert!(!matches("/a|/b", "/ab") && !matches("/a", "x/a"));
    }

    #[test]
    fn perl_classes_are_ascii() {
        assert!(matches(r"\d+", "123") && !matches(r"\d", "٣"));
        assert!(matches(r"\w", "a") && !matches(r"\w", "é") && matches(r"[\W]", "é"));
        assert!(matches(r"[\d-]+", "1-2") && matches(r"\S\s\S", "a b"));
    }

    #[test]
    fn what_re2_takes_literally() {
        assert!(matches(r"\Qa.b[\E", "a.b[") && !matches(r"\Qa.b\E", "axb"));
        assert!(matches(r"[a&&b]+", "&ab") && matches(r"[a[b]+", "[ab"));
        assert!(
            matches("/x{id}", "/x{id}") && matches("a{,3}", "a{,3}") && matches(r"\<a\>", "<a>")
        );
        assert!(
            matches("[[:alpha:]]+", "ab") && matches("[a-c]+", "abc") && matches("[a-]+", "a-")
        );
    }

    #[test]
    fn what_re2_refuses() {
        for pattern in [
            "a{1001}", "a**", r"\C", r"(a)\1", "(?x)a", "(?u:a)", "[a", "(a", r"a\", "*a",
        ] {
            assert!(Regex::new(pattern).is_err(), "{pattern} was taken");
        }
        assert!(Regex::new("a{1000}").is_ok());
    }
}
