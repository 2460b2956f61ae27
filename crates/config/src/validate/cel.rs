//! Whether a text is an expression of CEL (Common Expression Language, the grammar of its language definition). Names and
//! types are not looked at: what an expression may speak of is known to who evaluates it.

/// Says where and why `text` is no expression.
pub(super) fn check(text: &str) -> Result<(), String> {
    let tokens = Lexer { text, at: 0 }.all()?;
    let mut parser = Parser {
        tokens: &tokens,
        next: 0,
        depth: 0,
        end: text.len(),
    };
    parser.expression()?;
    match parser.peek() {
        None => Ok(()),
        Some(_) => Err(parser.unexpected("an operator or the end")),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    Name(&'a str),
    /// A number, a text, bytes.
    Literal,
    Sign(&'a str),
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Lexer<'a> {
    /// All tokens, each with its place in bytes.
    fn all(mut self) -> Result<Vec<(usize, Token<'a>)>, String> {
        let mut tokens = Vec::new();
        loop {
            self.blank();
            let start = self.at;
            let Some(first) = self.rest().chars().next() else {
                return Ok(tokens);
            };
            let token = match first {
                'a'..='z' | 'A'..='Z' | '_' => self.name_or_text()?,
                '0'..='9' => self.number()?,
                '.' if self.rest()[1..].starts_with(|c: char| c.is_ascii_digit()) => {
                    self.number()?
                }
                '"' | '\'' => self.quoted(false)?,
                _ => self.sign()?,
            };
            tokens.push((start, token));
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// Steps over as many characters as fit.
    fn take(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let length = rest.find(|c| !fits(c)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    fn blank(&mut self) {
        loop {
            self.take(|c| matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0c'));
            if !self.rest().starts_with("//") {
                return;
            }
            self.take(|c| c != '\n');
        }
    }

    fn name_or_text(&mut self) -> Result<Token<'a>, String> {
        let name = self.take(|c| c.is_ascii_alphanumeric() || c == '_');
        // r, b, and both in either order, stand before texts.
        let prefix = matches!(&*name.to_ascii_lowercase(), "r" | "b" | "rb" | "br");
        if prefix && self.rest().starts_with(['"', '\'']) {
            return self.quoted(name.contains(['r', 'R']));
        }
        Ok(Token::Name(name))
    }

    fn number(&mut self) -> Result<Token<'a>, String> {
        let start = self.at;
        if self.rest().starts_with("0x") || self.rest().starts_with("0X") {
            self.at += 2;
            if self.take(|c| c.is_ascii_hexdigit()).is_empty() {
                return Err(format!("at {start}: 0x needs digits"));
            }
            self.take_one(&['u', 'U']);
            return self.end_of_number(start);
        }
        self.take(|c| c.is_ascii_digit());
        let mut whole = true;
        if self.rest().starts_with('.')
            && self.rest()[1..].starts_with(|c: char| c.is_ascii_digit())
        {
            self.at += 1;
            self.take(|c| c.is_ascii_digit());
            whole = false;
        }
        if self.take_one(&['e', 'E']) {
            self.take_one(&['+', '-']);
            if self.take(|c| c.is_ascii_digit()).is_empty() {
                return Err(format!("at {start}: an exponent needs digits"));
            }
            whole = false;
        }
        if whole {
            self.take_one(&['u', 'U']);
        }
        self.end_of_number(start)
    }

    fn end_of_number(&self, start: usize) -> Result<Token<'a>, String> {
        let glued = self
            .rest()
            .starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        match glued {
            true => Err(format!(
                "at {start}: {:?} is no number",
                &self.text[start..=self.at]
            )),
            false => Ok(Token::Literal),
        }
    }

    fn take_one(&mut self, any: &[char]) -> bool {
        let found = self.rest().starts_with(any);
        self.at += usize::from(found);
        found
    }

    /// A text in one or three quotes of either kind; in raw ones a backslash is itself.
    fn quoted(&mut self, raw: bool) -> Result<Token<'a>, String> {
        let start = self.at;
        let one = &self.rest()[..1];
        let three = self
            .rest()
            .get(..3)
            .filter(|q| q.bytes().all(|b| b == one.as_bytes()[0]));
        let quote = three.unwrap_or(one);
        self.at += quote.len();
        loop {
            if self.rest().starts_with(quote) {
                self.at += quote.len();
                return Ok(Token::Literal);
            }
            match self.rest().chars().next() {
                None => return Err(format!("at {start}: the text has no end")),
                Some('\n' | '\r') if quote.len() == 1 => {
                    return Err(format!("at {start}: the text has no end on its line"));
                }
                Some('\\') if !raw => self.escape()?,
                Some(c) => self.at += c.len_utf8(),
            }
        }
    }

    fn escape(&mut self) -> Result<(), String> {
        let start = self.at;
        let digits = |count: usize, radix: u32| {
            let found = self.text.get(start + 2..start + 2 + count);
            found.is_some_and(|d| d.chars().all(|c| c.is_digit(radix)))
        };
        let length = match self.text[start + 1..].chars().next() {
            Some('a' | 'b' | 'f' | 'n' | 'r' | 't' | 'v' | '\\' | '?' | '"' | '\'' | '`') => 2,
            Some('x' | 'X') if digits(2, 16) => 4,
            Some('u') if digits(4, 16) => 6,
            Some('U') if digits(8, 16) => 10,
            Some('0'..='3') if digits(2, 8) => 4,
            _ => return Err(format!("at {start}: no such escape in a text")),
        };
        self.at += length;
        Ok(())
    }

    fn sign(&mut self) -> Result<Token<'a>, String> {
        let rest = self.rest();
        match SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
            Some(sign) => {
                self.at += sign.len();
                Ok(Token::Sign(sign))
            }
            None => Err(format!(
                "at {}: {:?} has no meaning here",
                self.at,
                rest.chars().next().unwrap_or_default()
            )),
        }
    }
}

/// Longer ones first.
const SIGNS: [&str; 24] = [
    "==", "!=", "<=", ">=", "&&", "||", "[", "]", "{", "}", "(", ")", ".", ",", "-", "!", "?", ":",
    "+", "*", "/", "%", "<", ">",
];
const RELATIONS: [&str; 6] = ["==", "!=", "<=", ">=", "<", ">"];
/// Words that are kept for languages around CEL.
const RESERVED: [&str; 18] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "in",
    "let",
    "loop",
    "namespace",
    "package",
    "return",
    "var",
    "void",
    "while",
];
/// As deep as expressions may nest.
const DEEPEST: usize = 100;

struct Parser<'t, 'a> {
    tokens: &'t [(usize, Token<'a>)],
    next: usize,
    depth: usize,
    end: usize,
}

impl<'a> Parser<'_, 'a> {
    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.next).map(|(_, token)| *token)
    }

    fn unexpected(&self, wanted: &str) -> String {
        match self.tokens.get(self.next) {
            Some((at, Token::Name(found) | Token::Sign(found))) => {
                format!("at {at}: {wanted} is expected, not {found:?}")
            }
            Some((at, Token::Literal)) => format!("at {at}: {wanted} is expected, not a value"),
            None => format!("at {}: {wanted} is expected", self.end),
        }
    }

    /// Steps over one of these signs.
    fn one_of(&mut self, signs: &[&str]) -> bool {
        let found = matches!(self.peek(), Some(Token::Sign(sign)) if signs.contains(&sign));
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, sign: &str) -> Result<(), String> {
        match self.one_of(&[sign]) {
            true => Ok(()),
            false => Err(self.unexpected(&format!("{sign:?}"))),
        }
    }

    fn expression(&mut self) -> Result<(), String> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(format!("is nested more than {DEEPEST} deep"));
        }
        self.operations()?;
        if self.one_of(&["?"]) {
            self.operations()?;
            self.expect(":")?;
            self.expression()?;
        }
        self.depth -= 1;
        Ok(())
    }

    /// Operands with two-sided operators between them: which binds stronger decides what an expression means, not
    /// whether it is one.
    fn operations(&mut self) -> Result<(), String> {
        loop {
            self.unary()?;
            let word = self.peek() == Some(Token::Name("in"));
            self.next += usize::from(word);
            if !word
                && !self.one_of(&["&&", "||", "+", "-", "*", "/", "%"])
                && !self.one_of(&RELATIONS)
            {
                return Ok(());
            }
        }
    }

    fn unary(&mut self) -> Result<(), String> {
        // One kind of sign, as often as one likes.
        if self.one_of(&["!"]) {
            while self.one_of(&["!"]) {}
        } else {
            while self.one_of(&["-"]) {}
        }
        // A name may turn out to be that of a message, whose fields follow.
        let mut named = self.primary()?;
        loop {
            if self.one_of(&["."]) {
                match self.peek() {
                    Some(Token::Name("in" | "true" | "false" | "null")) => {}
                    Some(Token::Name(_)) => {
                        self.next += 1;
                        if self.one_of(&["("]) {
                            named = false;
                            self.list(")", false)?;
                        }
                        continue;
                    }
                    _ => {}
                }
                return Err(self.unexpected("the name of a field or function"));
            } else if self.one_of(&["["]) {
                named = false;
                self.expression()?;
                self.expect("]")?;
            } else if named && self.one_of(&["{"]) {
                named = false;
                self.fields()?;
            } else {
                return Ok(());
            }
        }
    }

    /// Whether it is a name alone.
    fn primary(&mut self) -> Result<bool, String> {
        if self.one_of(&["("]) {
            self.expression()?;
            self.expect(")")?;
            return Ok(false);
        }
        if self.one_of(&["["]) {
            self.list("]", true)?;
            return Ok(false);
        }
        if self.one_of(&["{"]) {
            self.entries()?;
            return Ok(false);
        }
        let rooted = self.one_of(&["."]);
        match self.peek() {
            Some(Token::Literal) if !rooted => {
                self.next += 1;
                Ok(false)
            }
            Some(Token::Name(name)) if !RESERVED.contains(&name) => {
                self.next += 1;
                let called = self.one_of(&["("]);
                if called {
                    self.list(")", false)?;
                }
                Ok(!called)
            }
            _ => Err(self.unexpected("a value or a name")),
        }
    }

    /// Expressions up to the closing sign, perhaps with a comma behind the last.
    fn list(&mut self, close: &str, trailing: bool) -> Result<(), String> {
        if self.one_of(&[close]) {
            return Ok(());
        }
        loop {
            self.expression()?;
            if !self.one_of(&[","]) {
                return self.expect(close);
            }
            if trailing && self.one_of(&[close]) {
                return Ok(());
            }
        }
    }

    /// `key: value` up to the closing brace.
    fn entries(&mut self) -> Result<(), String> {
        while !self.one_of(&["}"]) {
            self.expression()?;
            self.expect(":")?;
            self.expression()?;
            if !self.one_of(&[","]) {
                return self.expect("}");
            }
        }
        Ok(())
    }

    /// `field: value` of a message, up to the closing brace.
    fn fields(&mut self) -> Result<(), String> {
        while !self.one_of(&["}"]) {
            match self.peek() {
                Some(Token::Name(_)) => self.next += 1,
                _ => return Err(self.unexpected("the name of a field")),
            }
            self.expect(":")?;
            self.expression()?;
            if !self.one_of(&[","]) {
                return self.expect("}");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn expressions_are_taken() {
        for good in [
            "response.code >= 400",
            "xds.cluster_name == 'BlackHoleCluster' || response.code >= 500u",
            "has(response.code_details) && request.headers['x-a'].startsWith(\"b\")",
            "!(connection.mtls) ? -1.5e3 : 0xFF",
            "[1, 2,].exists(x, x in {'a': 1,})",
            "google.rpc.Status{code: 1}.code == 1 // said",
            "r'\\d' + b\"\\x00\" + '''a\n'b''' != ''",
            ".a.b(1)",
            "- - 1 < 2",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_is_no_expression_is_told_with_its_place() {
        for (bad, why) in [
            ("", "at 0: a value or a name is expected"),
            (
                "response.code >>= 4",
                "at 15: a value or a name is expected, not \">=\"",
            ),
            ("a == ", "at 5: a value or a name is expected"),
            ("a b", "at 2: an operator or the end is expected, not \"b\""),
            ("'open", "at 0: the text has no end"),
            ("f(1,)", "at 4: a value or a name is expected, not \")\""),
            ("a = 1", "at 2: '=' has no meaning here"),
            (
                "while",
                "at 0: a value or a name is expected, not \"while\"",
            ),
            ("12ab", "at 0: \"12a\" is no number"),
            ("'\\q'", "at 1: no such escape in a text"),
            ("a ? b", "at 5: \":\" is expected"),
        ] {
            assert_eq!(check(bad), Err(why.to_owned()), "{bad}");
        }
        let deep = "(".repeat(200);
        assert!(check(&deep).is_err_and(|why| why.contains("nested")));
    }
}
