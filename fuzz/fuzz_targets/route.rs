//! Routes: the matcher finds what a reader of the configuration finds who knows no index and no compiled form.
#![no_main]

use std::borrow::Cow;

use libfuzzer_sys::{
    arbitrary::{self, Arbitrary},
    fuzz_target,
};
use outrigger_proto::{envoy::config::route::v3::RouteConfiguration as Message, json};
use outrigger_proxy::plan::{
    RouteConfiguration,
    route_match::{RequestView, RouteOutcome},
};
use serde_json::{Value, json};

/// Few words, so that what is configured and what is asked for often meet.
const DOMAINS: [&str; 12] =
    ["*", "a.b", "A.B", "*.b", "*.a.b", "*a.b", "a.*", "a.b.*", "x.a.b", "a.b:80", "*:80", "b"];
const HOSTS: [&str; 12] =
    ["a.b", "A.b", "x.a.b", "y.x.a.b", "xa.b", "a.c", "a.b.c", "a.b:80", "b", "b:80", "", ".b"];
const PATHS: [&str; 12] =
    ["/", "/a", "/A", "/a/", "/a/b", "/ab", "/a?q=1", "/a?q", "/a/b?q=2&q=1", "/a#f", "", "/a;p"];
const VALUES: [&str; 7] = ["", "v", "V", "v,v", "10", "-3", "vv"];
const METHODS: [&str; 3] = ["GET", "get", "POST"];
const PATTERNS: [&str; 4] = ["v+", "[vV]", ".*", "-?[0-9]+"];
const COOKIES: [&str; 6] = ["", "c=v", "a=b; c=V", "c=vv; c=v", "C=v", "c=\"v\""];
const QUERIES: [&str; 3] = ["1", "2", ""];

#[derive(Arbitrary, Debug)]
struct Input {
    hosts: Vec<(Vec<u8>, Vec<Route>)>,
    ignore_port: bool,
    host: u8,
    path: u8,
    method: u8,
    cookie: u8,
    fields: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
struct Route {
    path: u8,
    kind: u8,
    any_case: bool,
    header: Option<(u8, u8, bool, bool)>,
    query: Option<(u8, bool)>,
    method: Option<(u8, bool)>,
    cookie: Option<(u8, bool)>,
}

struct Request<'a> {
    host: &'a str,
    path: &'a str,
    method: &'a str,
    cookie: &'a str,
    value: Option<String>,
}

impl RequestView for Request<'_> {
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        match name {
            "x-v" => self.value.as_ref().map(|value| Cow::Borrowed(value.as_bytes())),
            ":method" => Some(Cow::Borrowed(self.method.as_bytes())),
            "cookie" if !self.cookie.is_empty() => Some(Cow::Borrowed(self.cookie.as_bytes())),
            _ => None,
        }
    }

    fn host(&self) -> &[u8] {
        self.host.as_bytes()
    }

    fn path(&self) -> &[u8] {
        self.path.as_bytes()
    }
}

fn of<'a>(words: &[&'a str], number: u8) -> &'a str {
    words[number as usize % words.len()]
}

/// Whether a whole text is what one of the patterns says.
fn is_pattern(pattern: &str, text: &str) -> bool {
    match pattern {
        "v+" => !text.is_empty() && text.chars().all(|c| c == 'v'),
        "[vV]" => text == "v" || text == "V",
        ".*" => !text.contains('\n'),
        _ => {
            let digits = text.strip_prefix('-').unwrap_or(text);
            !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit())
        }
    }
}

/// The path a route is matched with, as configured: no query, no fragment.
fn bare(path: &str) -> &str {
    path.split(['?', '#']).next().unwrap_or_default()
}

impl Route {
    fn wanted(&self) -> &'static str {
        bare(of(&PATHS, self.path))
    }

    fn kind(&self) -> u8 {
        match self.wanted() {
            // What may not be written for the other kinds.
            "" => 0,
            wanted if wanted.ends_with('/') && self.kind % 3 == 2 => 0,
            _ => self.kind % 3,
        }
    }

    fn message(&self, cluster: usize) -> Value {
        let kind = ["prefix", "path", "path_separated_prefix"][self.kind() as usize];
        let mut found = json!({kind: self.wanted(), "case_sensitive": !self.any_case});
        let mut headers = Vec::new();
        if let Some((how, number, invert, empty)) = self.header {
            let value = of(&VALUES, number);
            let mut header = match how % 9 {
                0 => json!({"string_match": {"exact": value}}),
                1 => json!({"string_match": {"prefix": format!("{value}v")}}),
                2 => json!({"string_match": {"exact": value, "ignore_case": true}}),
                3 => json!({"present_match": true}),
                4 => json!({"present_match": false}),
                5 => json!({"string_match": {"suffix": format!("v{value}")}}),
                6 => json!({"string_match": {"contains": format!("{value}v")}}),
                7 => json!({"range_match": {"start": -3, "end": 10 + i64::from(value.is_empty())}}),
                _ => json!({"string_match": {"safe_regex": {"regex": of(&PATTERNS, number)}}}),
            };
            header["name"] = json!("x-v");
            header["invert_match"] = json!(invert);
            header["treat_missing_header_as_empty"] = json!(empty);
            headers.push(header);
        }
        if let Some((method, invert)) = self.method {
            let exact = json!({"exact": of(&METHODS, method)});
            headers.push(json!({"name": ":method", "string_match": exact, "invert_match": invert}));
        }
        found["headers"] = json!(headers);
        if let Some((pattern, invert)) = self.cookie {
            let regex = json!({"safe_regex": {"regex": of(&PATTERNS, pattern)}});
            found["cookies"] = json!([{"name": "c", "string_match": regex, "invert_match": invert}]);
        }
        if let Some((value, present)) = self.query {
            let query = match present {
                true => json!({"name": "q", "present_match": true}),
                false => json!({"name": "q", "string_match": {"exact": of(&QUERIES, value)}}),
            };
            found["query_parameters"] = json!([query]);
        }
        json!({"match": found, "route": {"cluster": cluster.to_string()}})
    }

    fn fits(&self, request: &Request<'_>) -> bool {
        let lower = |text: &str| match self.any_case {
            true => text.to_ascii_lowercase(),
            false => text.to_owned(),
        };
        let (path, wanted) = (lower(bare(request.path)), lower(self.wanted()));
        let path_fits = !path.is_empty()
            && match self.kind() {
                0 => path.starts_with(&wanted),
                1 => path == wanted,
                _ => path == wanted || path.starts_with(&format!("{wanted}/")),
            };
        let method_fits = self.method.is_none_or(|(method, invert)| (of(&METHODS, method) == request.method) != invert);
        path_fits
            && self.header_fits(request)
            && method_fits
            && self.query_fits(request.path)
            && self.cookie_fits(request.cookie)
    }

    fn cookie_fits(&self, cookies: &str) -> bool {
        let Some((pattern, invert)) = self.cookie else {
            return true;
        };
        let first = cookies.split(';').filter_map(|pair| pair.trim().split_once('=')).find(|pair| pair.0 == "c");
        let fits = first.is_some_and(|(_, value)| {
            let bare = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
            is_pattern(of(&PATTERNS, pattern), bare.unwrap_or(value))
        });
        fits != invert
    }

    fn header_fits(&self, request: &Request<'_>) -> bool {
        let Some((how, number, invert, empty)) = self.header else {
            return true;
        };
        let told = match empty {
            true => Some(request.value.clone().unwrap_or_default()),
            false => request.value.clone(),
        };
        let value = of(&VALUES, number);
        let fits = match (how % 9, told) {
            (3, told) => told.is_some(),
            (4, told) => told.is_none(),
            // A value that is not there fits nothing, turned round or not.
            (_, None) => return false,
            (0, Some(told)) => told == value,
            (1, Some(told)) => told.starts_with(&format!("{value}v")),
            (5, Some(told)) => told.ends_with(&format!("v{value}")),
            (6, Some(told)) => told.contains(&format!("{value}v")),
            (7, Some(told)) => {
                let end = 10 + i64::from(value.is_empty());
                told.parse::<i64>().is_ok_and(|told| (-3..end).contains(&told))
            }
            (8, Some(told)) => is_pattern(of(&PATTERNS, number), &told),
            (_, Some(told)) => told.eq_ignore_ascii_case(value),
        };
        fits != invert
    }

    fn query_fits(&self, path: &str) -> bool {
        let Some((value, present)) = self.query else {
            return true;
        };
        let path = path.split('#').next().unwrap_or_default();
        let query = path.split_once('?').map_or("", |(_, query)| query);
        let first = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, ""))).find(|pair| pair.0 == "q");
        match (first, present) {
            (None, _) => false,
            (Some(_), true) => true,
            (Some((_, told)), false) => told == of(&QUERIES, value),
        }
    }
}

/// How well a domain fits: exact names first, then the longest of `*x`, then the longest of `x*`, then `*`.
fn rank(domain: &str, host: &str) -> Option<(u8, usize)> {
    if domain == "*" {
        return Some((0, 0));
    }
    if let Some(end) = domain.strip_prefix('*') {
        return (host.len() > end.len() && host.ends_with(end)).then_some((2, end.len()));
    }
    if let Some(begin) = domain.strip_suffix('*') {
        return (host.len() > begin.len() && host.starts_with(begin)).then_some((1, begin.len()));
    }
    (domain == host).then_some((3, 0))
}

fuzz_target!(|input: Input| {
    let mut number = 0;
    let hosts: Vec<Value> = input
        .hosts
        .iter()
        .enumerate()
        .map(|(index, (domains, routes))| {
            let domains: Vec<&str> = domains.iter().map(|domain| of(&DOMAINS, *domain)).collect();
            let routes: Vec<Value> = routes
                .iter()
                .map(|route| {
                    number += 1;
                    route.message(number - 1)
                })
                .collect();
            json!({"name": index.to_string(), "domains": domains, "routes": routes})
        })
        .collect();
    let value = json!({"name": "r", "virtual_hosts": hosts, "ignore_port_in_host_matching": input.ignore_port});
    let message: Message = json::from_value(&value).expect("the message is well formed");
    // What may not be configured: no domain, or one twice.
    let Ok(routes) = RouteConfiguration::try_from(&message) else {
        return;
    };
    let values: Vec<&str> = input.fields.iter().take(2).map(|field| of(&VALUES, *field)).collect();
    let request = Request {
        host: of(&HOSTS, input.host),
        path: of(&PATHS, input.path),
        method: of(&METHODS, input.method),
        cookie: of(&COOKIES, input.cookie),
        value: (!values.is_empty()).then(|| values.join(",")),
    };
    let mut host = request.host.to_ascii_lowercase();
    if input.ignore_port {
        host = host.strip_suffix(":80").unwrap_or(&host).to_owned();
    }
    let mut best = None;
    for (index, (domains, _)) in input.hosts.iter().enumerate() {
        for domain in domains {
            let domain = of(&DOMAINS, *domain).to_ascii_lowercase();
            if let Some(rank) = rank(&domain, &host)
                && best.is_none_or(|(other, _)| rank > other)
            {
                best = Some((rank, index));
            }
        }
    }
    let want = best.map(|(_, host)| {
        (host, input.hosts[host].1.iter().position(|route| route.fits(&request)))
    });
    let have = match routes.find(&request, 0) {
        RouteOutcome::Found(found) => {
            Some((found.virtual_host_index as usize, Some(found.route_index as usize)))
        }
        RouteOutcome::NoRoute(host) => Some((host.name.parse().expect("a number"), None)),
        RouteOutcome::NoVirtualHost => None,
        RouteOutcome::TlsRedirect(_) => panic!("nobody asked for TLS"),
    };
    assert_eq!(have, want, "{value} {:?} {:?} {:?}", request.host, request.path, request.value);
});
