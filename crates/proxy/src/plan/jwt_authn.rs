//! `envoy.filters.http.jwt_authn`: whose tokens are believed, where they stand in a request, and which of them a request
//! needs.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use tls::jwt::KeySet;

use super::{matcher::StringMatcher, route::RouteMatch};

/// `envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtAuthn {
    /// By name, in its order.
    pub providers: Vec<Arc<JwtProvider>>,
    /// The first whose condition holds says what is needed; `None` is nothing.
    pub rules: Vec<(RouteMatch, Option<Requirement>)>,
    /// What routes may choose, by name.
    pub requirement_map: Vec<(Arc<str>, Requirement)>,
    /// A CORS preflight passes as it is, since browsers send no tokens with it.
    pub bypass_cors_preflight: bool,
    /// Refusals say nothing but their status.
    pub strip_failure_response: bool,
    /// `http.<prefix>.jwt_authn.<stat_prefix>` of its statistics.
    pub stat_prefix: Arc<str>,
}

/// Somebody whose tokens are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtProvider {
    /// Its key in the configuration.
    pub name: Arc<str>,
    /// What `iss` must say; empty: anything.
    pub issuer: Arc<str>,
    /// One of these must be among `aud`; empty: anything.
    pub audiences: Vec<Box<str>>,
    /// On `sub`.
    pub subjects: Option<StringMatcher>,
    /// A token without `exp` is refused.
    pub require_expiration: bool,
    /// A token that is good for longer is refused.
    pub max_lifetime: Option<Duration>,
    /// The token goes on to the upstream.
    pub forward: bool,
    /// Where its tokens stand; all that are found must be valid.
    pub locations: Vec<Location>,
    /// Header that carries the claims, in base64url, to the upstream.
    pub forward_payload_header: Option<Arc<str>>,
    /// Its padding is added.
    pub pad_forward_payload_header: bool,
    /// Key of the claims in the dynamic metadata; empty: they are not left there.
    pub payload_in_metadata: Arc<str>,
    /// Claims whose text is a list, split at blanks before it gets there.
    pub space_delimited_claims: Vec<Box<str>>,
    /// Key of the token's header in the dynamic metadata; empty: it is not left there.
    pub header_in_metadata: Arc<str>,
    /// Seconds by which clocks may differ. Envoy's default: 60.
    pub clock_skew: u64,
    /// How many verified tokens are remembered. Default 100.
    pub cache_size: usize,
    /// Longer tokens are not remembered. Default 4096 bytes.
    pub cache_max_token: usize,
    /// Header and path of a claim.
    pub claim_to_headers: Vec<(Arc<str>, Arc<str>)>,
    /// The route is chosen again once the claims are known.
    pub clear_route_cache: bool,
    /// The issuer's keys.
    pub keys: KeySource,
}

/// Where a token stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// Behind the prefix in a header.
    Header {
        /// Lower case.
        name: Arc<str>,
        /// With its blank.
        prefix: Box<str>,
    },
    /// In a query parameter.
    Param(Box<str>),
    /// In a cookie.
    Cookie(Box<str>),
}

/// Where keys come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// The configuration.
    Inline(InlineKeys),
    /// A file, read when the filter comes to life.
    File(PathBuf),
    /// A server.
    Remote(RemoteKeys),
}

/// Keys in the configuration. `None` where they make no key set: then no token is believed, as in Envoy; a rejection
/// would leave an older configuration in force that may not ask for tokens at all.
#[derive(Debug, Clone)]
pub struct InlineKeys {
    text: Bytes,
    keys: Option<Arc<KeySet>>,
}

impl InlineKeys {
    /// Reads them.
    pub fn new(text: Bytes) -> Result<Self, tls::jwt::KeySetError> {
        let keys = KeySet::parse(&text)?;
        Ok(Self {
            text,
            keys: Some(Arc::new(keys)),
        })
    }

    /// No keys, for what could not be read.
    pub fn none(text: Bytes) -> Self {
        Self { text, keys: None }
    }

    /// The keys.
    pub fn keys(&self) -> Option<&Arc<KeySet>> {
        self.keys.as_ref()
    }
}

/// The keys follow from the text.
impl PartialEq for InlineKeys {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for InlineKeys {}

/// `RemoteJwks`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteKeys {
    /// Who is asked.
    pub cluster: Arc<str>,
    /// `host[:port]` of the URI.
    pub authority: Box<str>,
    /// The rest of it.
    pub path: Box<str>,
    /// How long an answer may take.
    pub timeout: Duration,
    /// How long keys are used. Default 10 min.
    pub cache_duration: Duration,
    /// Keys are fetched ahead, and after a failure again after so long; the old ones are kept meanwhile.
    pub ahead: Option<Duration>,
    /// Further attempts, with the bounds of the waits between them.
    pub retries: u32,
    /// Lower and upper bound of the waits.
    pub backoff: (Duration, Duration),
}

/// What a request needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Requirement {
    /// A token of the provider of this number.
    Provider {
        /// Index among the providers.
        provider: usize,
        /// Audiences in place of the provider's.
        audiences: Option<Vec<Box<str>>>,
    },
    /// One of these.
    Any(Vec<Requirement>),
    /// All of these.
    All(Vec<Requirement>),
    /// No token, or one that is valid, of these providers.
    AllowMissing(Vec<usize>),
    /// Anything; a valid token of these providers is used.
    AllowMissingOrFailed(Vec<usize>),
}
