//! Expressions of the Common Expression Language about a request that is over, for access logs.
//!
//! What is here: the operators but arithmetic, `in`, members and indices, `has`, `size`, `int`, `string`, `duration`, and
//! on texts `contains`, `startsWith`, `endsWith`, `matches`; Envoy's attributes. Anything else is an error when the
//! configuration comes, and never an expression that silently holds for nothing.

use std::{sync::Arc, time::Duration};

use super::regex::Regex;

/// An expression.
#[derive(Debug, Clone, PartialEq)]
pub enum Expr {
    /// Itself.
    Literal(Literal),
    /// What Envoy knows under this name: `request.headers`, `response.code` …
    Attribute(Attribute),
    /// A member or an element.
    Index(Box<Expr>, Box<Expr>),
    /// A list.
    List(Vec<Expr>),
    /// `!`.
    Not(Box<Expr>),
    /// `&&`.
    And(Box<Expr>, Box<Expr>),
    /// `||`.
    Or(Box<Expr>, Box<Expr>),
    /// `? :`.
    If(Box<[Expr; 3]>),
    /// Two values compared.
    Compare(Compare, Box<Expr>, Box<Expr>),
    /// `in`: an element of a list, or a key of a map.
    In(Box<Expr>, Box<Expr>),
    /// A text looked at.
    Text(TextTest, Box<Expr>, Box<Expr>),
    /// `matches` with a fixed expression.
    Matches(Box<Expr>, Regex),
    /// `has`: whether there is such a value.
    Has(Box<Expr>),
    /// `size`.
    Size(Box<Expr>),
    /// `int`.
    Int(Box<Expr>),
    /// `string`.
    Str(Box<Expr>),
}

// Numbers with a point are finite: they were written down.
impl Eq for Expr {}

/// A value that is written down.
#[derive(Debug, Clone, PartialEq)]
pub enum Literal {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a point.
    Float(f64),
    /// A text.
    Text(Arc<str>),
    /// `duration('1s')`.
    Duration(Duration),
}

/// How two values are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// `==`.
    Eq,
    /// `!=`.
    Ne,
    /// `<`.
    Lt,
    /// `<=`.
    Le,
    /// `>`.
    Gt,
    /// `>=`.
    Ge,
}

/// What is asked of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextTest {
    /// `contains`.
    Contains,
    /// `startsWith`.
    StartsWith,
    /// `endsWith`.
    EndsWith,
}

macro_rules! attributes {
    ($($(#[$meta:meta])* $name:ident = $text:literal;)*) => {
        /// What Envoy knows of a request, by its name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Attribute {
            $($(#[$meta])* $name,)*
        }

        impl Attribute {
            /// The attribute of this name.
            fn named(name: &str) -> Option<Attribute> {
                match name {
                    $($text => Some(Attribute::$name),)*
                    _ => None,
                }
            }
        }
    };
}

attributes! {
    /// `:path` with its query.
    RequestPath = "request.path";
    /// `:path` without its query.
    RequestUrlPath = "request.url_path";
    /// The query.
    RequestQuery = "request.query";
    /// The authority.
    RequestHost = "request.host";
    /// `http` or `https`.
    RequestScheme = "request.scheme";
    /// The method.
    RequestMethod = "request.method";
    /// Headers by lower-case name.
    RequestHeaders = "request.headers";
    /// `referer`.
    RequestReferer = "request.referer";
    /// `user-agent`.
    RequestUserAgent = "request.useragent";
    /// `x-request-id`.
    RequestId = "request.id";
    /// `HTTP/1.1` …
    RequestProtocol = "request.protocol";
    /// Bytes of its body.
    RequestSize = "request.size";
    /// Bytes of headers and body.
    RequestTotalSize = "request.total_size";
    /// From its first byte to the last of the response.
    RequestDuration = "request.duration";
    /// The status; 0 without a response.
    ResponseCode = "response.code";
    /// Why.
    ResponseCodeDetails = "response.code_details";
    /// Flags as the bits that Envoy gives them.
    ResponseFlags = "response.flags";
    /// The status of gRPC.
    ResponseGrpcStatus = "response.grpc_status";
    /// Headers by lower-case name.
    ResponseHeaders = "response.headers";
    /// Trailers by lower-case name.
    ResponseTrailers = "response.trailers";
    /// Bytes of its body.
    ResponseSize = "response.size";
    /// From the first byte that went up to the first that came down.
    ResponseBackendLatency = "response.backend_latency";
    /// The client, with its port.
    SourceAddress = "source.address";
    /// The client's port.
    SourcePort = "source.port";
    /// Our address, with the port.
    DestinationAddress = "destination.address";
    /// Our port.
    DestinationPort = "destination.port";
    /// The connection's number.
    ConnectionId = "connection.id";
    /// The client has shown a certificate.
    ConnectionMtls = "connection.mtls";
    /// The server name that was asked for.
    ConnectionServerName = "connection.requested_server_name";
    /// `TLSv1.3` …
    ConnectionTlsVersion = "connection.tls_version";
    /// The subject of the client's certificate.
    ConnectionPeerSubject = "connection.subject_peer_certificate";
    /// The first URI of the client's certificate.
    ConnectionPeerUri = "connection.uri_san_peer_certificate";
    /// The first DNS name of the client's certificate.
    ConnectionPeerDns = "connection.dns_san_peer_certificate";
    /// Why it ended.
    ConnectionTermination = "connection.termination_details";
    /// The upstream host, with its port.
    UpstreamAddress = "upstream.address";
    /// The upstream host's port.
    UpstreamPort = "upstream.port";
    /// Our side of the connection to it.
    UpstreamLocalAddress = "upstream.local_address";
    /// `TLSv1.3` …
    UpstreamTlsVersion = "upstream.tls_version";
    /// Why there is no connection.
    UpstreamFailure = "upstream.transport_failure_reason";
    /// Attempts.
    UpstreamAttempts = "upstream.request_attempt_count";
    /// The cluster.
    ClusterName = "xds.cluster_name";
    /// The route.
    RouteName = "xds.route_name";
    /// The filter chain.
    FilterChainName = "xds.filter_chain_name";
    /// Metadata that filters have left, by namespace.
    Metadata = "metadata";
    /// What filters have left, by key.
    FilterState = "filter_state";
}

/// Parses an expression.
///
/// # Errors
/// What is wrong, and where.
pub fn parse(text: &str) -> Result<Expr, String> {
    if text.len() > LONGEST {
        return Err(format!("must have at most {LONGEST} bytes"));
    }
    let mut parser = Parser {
        text,
        at: 0,
        depth: 0,
    };
    let parsed = parser.conditional()?;
    parser.space();
    match parser.at == text.len() {
        true => Ok(parsed),
        false => Err(parser.wrong("an operator or the end")),
    }
}

/// Bytes of an expression.
const LONGEST: usize = 4096;
/// Expressions within expressions.
const DEEPEST: usize = 64;

struct Parser<'t> {
    text: &'t str,
    at: usize,
    depth: usize,
}

type Parsed = Result<Expr, String>;

impl<'t> Parser<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn wrong(&self, wanted: &str) -> String {
        let found: String = self.rest().chars().take(12).collect();
        match found.is_empty() {
            true => format!("{wanted} is missing at the end"),
            false => format!("{wanted} was expected at `{found}` (byte {})", self.at),
        }
    }

    /// Takes a sign.
    fn take(&mut self, sign: &str) -> bool {
        self.space();
        let is = self.rest().starts_with(sign);
        if is {
            self.at += sign.len();
        }
        is
    }

    fn need(&mut self, sign: &str) -> Result<(), String> {
        match self.take(sign) {
            true => Ok(()),
            false => Err(self.wrong(&format!("`{sign}`"))),
        }
    }

    fn name(&mut self) -> Option<&'t str> {
        self.space();
        let rest = self.rest();
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let end = rest
            .bytes()
            .position(|byte| !is_name(byte))
            .unwrap_or(rest.len());
        let begins = rest
            .bytes()
            .next()
            .is_some_and(|byte| !byte.is_ascii_digit());
        if end == 0 || !begins {
            return None;
        }
        self.at += end;
        Some(&rest[..end])
    }

    fn conditional(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err("is nested too deeply".to_owned());
        }
        let condition = self.or()?;
        let parsed = if self.take("?") {
            let yes = self.or()?;
            self.need(":")?;
            let no = self.conditional()?;
            Expr::If(Box::new([condition, yes, no]))
        } else {
            condition
        };
        self.depth -= 1;
        Ok(parsed)
    }

    fn or(&mut self) -> Parsed {
        let mut left = self.and()?;
        while self.take("||") {
            left = Expr::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> Parsed {
        let mut left = self.relation()?;
        while self.take("&&") {
            left = Expr::And(Box::new(left), Box::new(self.relation()?));
        }
        Ok(left)
    }

    fn relation(&mut self) -> Parsed {
        let left = self.unary()?;
        for (sign, compare) in [
            ("==", Compare::Eq),
            ("!=", Compare::Ne),
            ("<=", Compare::Le),
            (">=", Compare::Ge),
            ("<", Compare::Lt),
            (">", Compare::Gt),
        ] {
            if self.take(sign) {
                return Ok(Expr::Compare(
                    compare,
                    Box::new(left),
                    Box::new(self.unary()?),
                ));
            }
        }
        let before = self.at;
        match self.name() {
            Some("in") => Ok(Expr::In(Box::new(left), Box::new(self.unary()?))),
            _ => {
                self.at = before;
                Ok(left)
            }
        }
    }

    fn unary(&mut self) -> Parsed {
        self.space();
        if self.rest().starts_with('!') && !self.rest().starts_with("!=") {
            self.at += 1;
            self.depth += 1;
            if self.depth > DEEPEST {
                return Err("is nested too deeply".to_owned());
            }
            let inner = self.unary()?;
            self.depth -= 1;
            return Ok(Expr::Not(Box::new(inner)));
        }
        let mut value = self.primary()?;
        loop {
            if self.take("[") {
                let index = self.conditional()?;
                self.need("]")?;
                value = Expr::Index(Box::new(value), Box::new(index));
            } else if self.take(".") {
                let Some(name) = self.name() else {
                    return Err(self.wrong("a name"));
                };
                value = match self.take("(") {
                    true => self.method(value, name)?,
                    false => {
                        let key = Expr::Literal(Literal::Text(name.into()));
                        Expr::Index(Box::new(value), Box::new(key))
                    }
                };
            } else {
                return Ok(value);
            }
        }
    }

    fn method(&mut self, of: Expr, name: &str) -> Parsed {
        let test = match name {
            "contains" => Some(TextTest::Contains),
            "startsWith" => Some(TextTest::StartsWith),
            "endsWith" => Some(TextTest::EndsWith),
            "matches" => None,
            "size" => {
                self.need(")")?;
                return Ok(Expr::Size(Box::new(of)));
            }
            _ => return Err(format!("there is no function `{name}` here")),
        };
        let argument = self.conditional()?;
        self.need(")")?;
        match (test, argument) {
            (Some(test), argument) => Ok(Expr::Text(test, Box::new(of), Box::new(argument))),
            (None, Expr::Literal(Literal::Text(pattern))) => {
                let regex = Regex::new(&pattern).map_err(|why| format!("`matches`: {why}"))?;
                Ok(Expr::Matches(Box::new(of), regex))
            }
            (None, _) => Err("`matches` takes a fixed text".to_owned()),
        }
    }

    fn primary(&mut self) -> Parsed {
        self.space();
        if self.take("(") {
            let inner = self.conditional()?;
            self.need(")")?;
            return Ok(inner);
        }
        if self.take("[") {
            let mut list = Vec::new();
            while !self.take("]") {
                list.push(self.conditional()?);
                if !self.take(",") {
                    self.need("]")?;
                    break;
                }
            }
            return Ok(Expr::List(list));
        }
        match self.rest().bytes().next() {
            Some(b'\'' | b'"') => {
                return self.text().map(|text| Expr::Literal(Literal::Text(text)));
            }
            Some(b'-' | b'0'..=b'9') => return self.number(),
            _ => {}
        }
        match self.name() {
            Some("true") => Ok(Expr::Literal(Literal::Bool(true))),
            Some("false") => Ok(Expr::Literal(Literal::Bool(false))),
            Some("null") => Ok(Expr::Literal(Literal::Null)),
            Some(name) if self.take("(") => self.function(name),
            Some(name) => self.attribute(name),
            None => Err(self.wrong("a value")),
        }
    }

    fn function(&mut self, name: &str) -> Parsed {
        let argument = self.conditional()?;
        self.need(")")?;
        let argument = Box::new(argument);
        Ok(match (name, *argument) {
            ("has", of @ Expr::Index(..)) => Expr::Has(Box::new(of)),
            ("has", of @ Expr::Attribute(_)) => Expr::Has(Box::new(of)),
            ("has", _) => return Err("`has` takes a member".to_owned()),
            ("size", of) => Expr::Size(Box::new(of)),
            ("int", of) => Expr::Int(Box::new(of)),
            ("string", of) => Expr::Str(Box::new(of)),
            ("duration", Expr::Literal(Literal::Text(text))) => {
                Expr::Literal(Literal::Duration(duration(&text)?))
            }
            _ => return Err(format!("there is no function `{name}` here")),
        })
    }

    /// `root.member`, or a root that is a map by itself.
    fn attribute(&mut self, root: &str) -> Parsed {
        if let Some(map) = Attribute::named(root) {
            return Ok(Expr::Attribute(map));
        }
        self.need(".")?;
        let Some(member) = self.name() else {
            return Err(self.wrong("a name"));
        };
        let name = format!("{root}.{member}");
        match Attribute::named(&name) {
            Some(attribute) => Ok(Expr::Attribute(attribute)),
            None => Err(format!("there is no attribute `{name}` here")),
        }
    }

    fn number(&mut self) -> Parsed {
        let rest = self.rest();
        let part = |byte: u8| byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'e' | b'E');
        let end = rest
            .bytes()
            .position(|byte| !part(byte))
            .unwrap_or(rest.len());
        let text = &rest[..end];
        let literal = match text.parse::<i64>() {
            Ok(whole) => Literal::Int(whole),
            Err(_) => {
                let number = text.parse::<f64>().ok().filter(|number| number.is_finite());
                Literal::Float(number.ok_or_else(|| self.wrong("a number"))?)
            }
        };
        self.at += end;
        // Of numbers without a sign no more is known here.
        if self.rest().starts_with(['u', 'U']) {
            self.at += 1;
        }
        Ok(Expr::Literal(literal))
    }

    fn text(&mut self) -> Result<Arc<str>, String> {
        let mut letters = self.rest().char_indices();
        let quote = letters.next().map(|(_, quote)| quote);
        let mut out = String::new();
        while let Some((at, letter)) = letters.next() {
            match letter {
                letter if Some(letter) == quote => {
                    self.at += at + 1;
                    return Ok(out.into());
                }
                '\\' => match letters.next().map(|(_, letter)| letter) {
                    Some('n') => out.push('\n'),
                    Some('t') => out.push('\t'),
                    Some('r') => out.push('\r'),
                    Some(plain @ ('\\' | '\'' | '"' | '?' | '`')) => out.push(plain),
                    _ => {
                        return Err(
                            self.wrong("a text with the escapes \\n, \\t, \\r, \\\\, \\', \\\"")
                        );
                    }
                },
                letter => out.push(letter),
            }
        }
        Err(self.wrong("a text that ends"))
    }
}

/// `1.5s`, `20ms`, `1m` or `2h`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration: write one such as 1.5s or 20ms");
    let end = text
        .find(|letter: char| letter.is_ascii_alphabetic())
        .ok_or_else(wrong)?;
    let number: f64 = text[..end].parse().map_err(|_| wrong())?;
    let unit = match &text[end..] {
        "h" => 3600.0,
        "m" => 60.0,
        "s" => 1.0,
        "ms" => 1e-3,
        "us" => 1e-6,
        "ns" => 1e-9,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_bind_as_the_language_says() {
        for (loose, strict) in [
            ("true || false && !true", "true || (false && (!true))"),
            (
                "response.code >= 400 && connection.mtls",
                "(response.code >= 400) && (connection.mtls)",
            ),
            (
                "!request.path.contains('a')",
                "!(request.path.contains('a'))",
            ),
            (
                "'a' in request.headers || true",
                "('a' in request.headers) || true",
            ),
            ("true ? 1 : false ? 2 : 3", "true ? 1 : (false ? 2 : 3)"),
            ("request.headers.x", "request.headers['x']"),
        ] {
            assert_eq!(parse(loose), parse(strict), "{loose}");
            assert!(parse(loose).is_ok(), "{:?}", parse(loose));
        }
    }

    #[test]
    fn what_is_not_known_is_said() {
        for (text, why) in [
            ("", "a value is missing at the end"),
            ("response.code >", "a value is missing"),
            (
                "response.code 400",
                "an operator or the end was expected at `400`",
            ),
            ("request.nothing == 1", "no attribute `request.nothing`"),
            ("request.path.upper()", "no function `upper`"),
            ("exists(request.path)", "no function `exists`"),
            ("'open", "a text that ends"),
            ("request.path.matches('(')", "`matches`: unclosed group"),
            ("has(1)", "`has` takes a member"),
            ("duration('1')", "no duration"),
            ("1 + 1 == 2", "an operator or the end"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(parse(&"(".repeat(5000)).is_err());
        assert!(parse(&"(".repeat(4000)).unwrap_err().contains("too deeply"));
        assert!(parse(&"!".repeat(4000)).unwrap_err().contains("too deeply"));
    }
}
