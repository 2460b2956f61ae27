//! Where tokens stand in a request, and how one is taken off.

use std::borrow::Cow;

use outrigger_http::RequestHead;

use crate::plan::{
    jwt_authn::{JwtProvider, Location},
    matcher::{cookie, query_parameter},
};

/// A token in a request.
#[derive(Debug)]
pub(super) struct Found<'p> {
    pub(super) text: String,
    /// Which providers may have put it there, and where.
    pub(super) issuers: Vec<&'p str>,
    pub(super) location: &'p Location,
}

impl Found<'_> {
    /// Whether a token of this issuer may stand here.
    pub(super) fn allows(&self, issuer: &str) -> bool {
        let mut issuers = self.issuers.iter();
        issuers.any(|own| own.is_empty() || *own == issuer)
    }
}

/// The tokens at all places of these providers.
///
/// They are copied out of the request: what is done with them changes it.
pub(super) fn tokens<'p>(
    request: &RequestHead,
    providers: impl Iterator<Item = &'p JwtProvider>,
) -> Vec<Found<'p>> {
    let mut places: Vec<(&Location, Vec<&str>)> = Vec::new();
    for provider in providers {
        for location in &provider.locations {
            match places.iter_mut().find(|(known, _)| *known == location) {
                Some((_, issuers)) => issuers.push(&provider.issuer),
                None => places.push((location, vec![&provider.issuer])),
            }
        }
    }
    let mut found = Vec::new();
    for (location, issuers) in places {
        let mut add = |text: Cow<'_, str>| {
            found.push(Found {
                text: text.into_owned(),
                issuers: issuers.clone(),
                location,
            });
        };
        match location {
            Location::Header { name, prefix } => {
                for value in request.headers.get_all(name) {
                    // What is no text is no token, but it is there.
                    let value = String::from_utf8_lossy(value);
                    match value.find(&**prefix) {
                        _ if prefix.is_empty() => add(value),
                        Some(at) => add(value[at + prefix.len()..].trim().to_owned().into()),
                        None => {}
                    }
                }
            }
            Location::Param(name) => {
                if let Some(value) = query_parameter(request.path().as_bytes(), name.as_bytes()) {
                    add(decoded(value));
                }
            }
            Location::Cookie(name) => {
                let mut cookies = request.headers.get_all("cookie");
                if let Some(value) = cookies.find_map(|all| cookie(all, name.as_bytes())) {
                    add(String::from_utf8_lossy(value));
                }
            }
        }
    }
    found
}

/// Takes the token off, so that nobody else can use it. Cookies stay, as in Envoy: the client keeps them anyway.
pub(super) fn remove(request: &mut RequestHead, location: &Location) {
    match location {
        Location::Header { name, .. } => {
            request.headers.remove(name);
        }
        Location::Param(name) => {
            let path = request.path();
            let Some((bare, query)) = path.split_once('?') else {
                return;
            };
            let kept: Vec<&str> = query
                .split('&')
                .filter(|pair| pair.split('=').next() != Some(&**name))
                .collect();
            let path = match kept.is_empty() {
                true => bare.to_owned(),
                false => format!("{bare}?{}", kept.join("&")),
            };
            request.set_path(&path);
        }
        Location::Cookie(_) => {}
    }
}

/// Percent-decoded; what is not UTF-8 then is no token.
fn decoded(value: &[u8]) -> Cow<'_, str> {
    if !value.contains(&b'%') {
        return String::from_utf8_lossy(value);
    }
    let hex = |byte: u8| (byte as char).to_digit(16);
    let (mut out, mut at) = (Vec::with_capacity(value.len()), 0);
    while let Some(&byte) = value.get(at) {
        let pair = value.get(at + 1).zip(value.get(at + 2));
        match pair.and_then(|(a, b)| Some(hex(*a)? * 16 + hex(*b)?)) {
            Some(code) if byte == b'%' => {
                out.push(code as u8);
                at += 3;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned().into()
}
