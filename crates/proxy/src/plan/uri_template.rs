//! URI templates: paths with `*`, `**` and `{variables}`, for matching and for rewriting.
//!
//! A template is a list of segments between slashes: a literal, `*` (one segment), `**` (any number of them), or
//! `{name}`, `{name=pattern}`, which remembers what it took. After the last one a literal may follow without a slash
//! (`/videos/**.mpd`). Nothing that globs may follow a `**`. Operators take the characters that RFC 3986 allows in a
//! path segment, `*` and `=` among them, as Envoy's do: a policy would not see a path with a character that they leave out.

use super::regex::Regex;

/// `UriTemplateMatchConfig.path_template`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UriTemplate {
    /// Matches the path without its query; each variable is a group.
    regex: Regex,
    variables: Vec<Box<str>>,
}

/// `UriTemplateRewriteConfig.path_template_rewrite`, tied to the template that matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UriTemplateRewrite {
    template: UriTemplate,
    pieces: Vec<Piece>,
}

/// Part of a [`UriTemplateRewrite`].
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(Box<str>),
    /// What the variable of this number took.
    Variable(usize),
}

impl UriTemplate {
    /// Reads a template.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut rest = text
            .strip_prefix('/')
            .ok_or_else(|| format!("`{text}` must begin with a slash"))?;
        let mut parser = Parser::default();
        parser.regex.push('/');
        while !rest.is_empty() {
            rest = parser.segment(rest)?;
            rest = match rest.strip_prefix('/') {
                Some(after) => {
                    parser.regex.push('/');
                    after
                }
                None if rest.is_empty() => rest,
                None => {
                    let after = parser.literal(rest)?;
                    if !after.is_empty() {
                        return Err(format!("`{rest}` must be the end of the template"));
                    }
                    after
                }
            };
        }
        Ok(Self {
            regex: Regex::new(&parser.regex)?,
            variables: parser.variables,
        })
    }

    /// Whether a path (without its query) matches.
    pub fn is_match(&self, path: &[u8]) -> bool {
        self.regex.is_match(path)
    }
}

impl UriTemplateRewrite {
    /// Reads a rewrite, whose variables are the template's.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str, template: &UriTemplate) -> Result<Self, String> {
        if !text.starts_with('/') {
            return Err(format!("`{text}` must begin with a slash"));
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let Some(inner) = rest.strip_prefix('{') else {
                let end = rest.find('{').unwrap_or(rest.len());
                let literal = &rest[..end];
                if !literal.bytes().all(|byte| byte == b'/' || is_literal(byte)) {
                    return Err(format!("`{literal}` has characters that a path does not"));
                }
                if literal.contains("//") {
                    return Err(format!("`{literal}` has an empty segment"));
                }
                pieces.push(Piece::Text(literal.into()));
                rest = &rest[end..];
                continue;
            };
            let (name, after) = inner
                .split_once('}')
                .ok_or_else(|| format!("`{text}` has a `{{` without its `}}`"))?;
            let number = template.variables.iter().position(|v| **v == *name);
            pieces.push(Piece::Variable(number.ok_or_else(|| {
                format!("`{name}` is no variable of the template that matches")
            })?));
            rest = after;
        }
        Ok(Self {
            template: template.clone(),
            pieces,
        })
    }

    /// The new path (without a query) for one that the template matches.
    pub fn rewrite(&self, path: &str) -> Option<String> {
        let captures = self.template.regex.captures(path.as_bytes())?;
        let mut out = String::with_capacity(path.len());
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Variable(number) => {
                    let taken = captures.get(number + 1)?;
                    out.push_str(path.get(taken.range())?);
                }
            }
        }
        Some(out)
    }
}

#[derive(Default)]
struct Parser {
    regex: String,
    variables: Vec<Box<str>>,
    /// A `**` was read: nothing may glob after it.
    open_end: bool,
}

impl Parser {
    /// Reads one segment and gives what follows.
    fn segment<'t>(&mut self, text: &'t str) -> Result<&'t str, String> {
        let Some(inner) = text.strip_prefix('{') else {
            return self.operator_or_literal(text);
        };
        let (variable, after) = inner
            .split_once('}')
            .ok_or_else(|| format!("`{text}` has a `{{` without its `}}`"))?;
        let (name, pattern) = variable.split_once('=').unwrap_or((variable, "*"));
        let legal = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && name.len() <= MAX_NAME;
        if !legal {
            return Err(format!(
                "`{name}` is no variable name: a letter, then at most {} letters, digits and underscores",
                MAX_NAME - 1
            ));
        }
        if self.variables.iter().any(|v| **v == *name) {
            return Err(format!("has the variable `{name}` twice"));
        }
        if self.variables.len() == MAX_VARIABLES {
            return Err(format!("has more than {MAX_VARIABLES} variables"));
        }
        self.variables.push(name.into());
        self.regex.push('(');
        for (number, part) in pattern.split('/').enumerate() {
            if number > 0 {
                self.regex.push('/');
            }
            if !self.operator_or_literal(part)?.is_empty() {
                return Err(format!("`{pattern}` is no pattern of a variable"));
            }
        }
        self.regex.push(')');
        Ok(after)
    }

    fn operator_or_literal<'t>(&mut self, text: &'t str) -> Result<&'t str, String> {
        let (operator, after) = match text.strip_prefix("**") {
            Some(after) => (format!("[{PCHAR}/]*"), after),
            None => match text.strip_prefix('*') {
                Some(after) => (format!("[{PCHAR}]+"), after),
                None => return self.literal(text),
            },
        };
        if self.open_end {
            return Err("has an operator or variable after `**`".into());
        }
        self.open_end = text.starts_with("**");
        self.regex.push_str(&operator);
        Ok(after)
    }

    /// Reads text up to the next slash.
    fn literal<'t>(&mut self, text: &'t str) -> Result<&'t str, String> {
        let (literal, after) = text.split_at(text.find('/').unwrap_or(text.len()));
        if literal.is_empty() || !literal.bytes().all(is_literal) {
            return Err(format!("`{literal}` is no text of a path segment"));
        }
        for c in literal.chars() {
            if "$()+.*".contains(c) {
                self.regex.push('\\');
            }
            self.regex.push(c);
        }
        Ok(after)
    }
}

fn is_literal(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=*".contains(&byte)
}

/// The same as a class of a regular expression.
const PCHAR: &str = "a-zA-Z0-9-._~%!$&'()+,;:@=*";

/// Envoy's limits.
const MAX_VARIABLES: usize = 5;
const MAX_NAME: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(template: &str, path: &str) -> bool {
        UriTemplate::parse(template)
            .expect(template)
            .is_match(path.as_bytes())
    }

    #[test]
    fn operators_take_what_their_names_say() {
        for (template, path, fits) in [
            ("/a/*/c", "/a/b/c", true),
            ("/a/*/c", "/a/b/b/c", false),
            ("/a/*/c", "/a//c", false),
            ("/a/**", "/a/b/c", true),
            ("/a/**", "/a/", true),
            ("/a/**", "/a", false),
            ("/**.mpd", "/x/y/z.mpd", true),
            ("/**.mpd", "/x/y/zXmpd", false),
            ("/v/{lang}/{rest=**}", "/v/en/1/2", true),
            ("/v/{lang=en/*}/x", "/v/en/gb/x", true),
            ("/v/{lang=en/*}/x", "/v/de/at/x", false),
            ("/a/", "/a/", true),
            ("/a/", "/a", false),
            ("/a/*/c", "/a/b=1*/c", true),
            ("/a/**", "/a/x=*/*", true),
            ("/{a}/c", "/*=/c", true),
            ("/a=1/*", "/a=1/b", true),
            ("/a*b/c", "/a*b/c", true),
            ("/a*b/c", "/aab/c", false),
        ] {
            assert_eq!(matches(template, path), fits, "{template} {path}");
        }
    }

    #[test]
    fn variables_move_into_the_new_path() {
        let template = UriTemplate::parse("/v/{lang}/{file=**}.m4s").expect("legal");
        let rewrite = UriTemplateRewrite::parse("/{file}/in-{lang}", &template).expect("legal");
        assert_eq!(
            rewrite.rewrite("/v/en/a/b.m4s").as_deref(),
            Some("/a/b/in-en")
        );
        assert_eq!(rewrite.rewrite("/x"), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (template, word) in [
            ("a", "begin with a slash"),
            ("/{a}/{a}", "twice"),
            ("/{a", "without its"),
            ("/**/*", "after `**`"),
            ("/{1}", "variable name"),
            ("/a{b}", "no text"),
            ("/{a}/{b}/{c}/{d}/{e}/{f}", "more than 5"),
        ] {
            let error = UriTemplate::parse(template).expect_err(template);
            assert!(error.contains(word), "{template}: {error}");
        }
        let template = UriTemplate::parse("/{a}").expect("legal");
        let error = UriTemplateRewrite::parse("/{b}", &template).expect_err("unknown");
        assert!(error.contains("no variable"), "{error}");
    }
}
