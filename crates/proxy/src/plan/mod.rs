//! Plans: what a configuration message means, once, for all workers.
//!
//! A protobuf *message* is turned once into a *plan*: typed, immutable, validated, comparable, without I/O. A plan
//! becomes *live* in each worker (sockets, pools, cursors). Whoever holds a plan needs no further check: defaults are
//! applied, names are interned, expressions are compiled, and what is not implemented was rejected with the path
//! of its field ([`PlanError`]).
//!
//! Read in this order: [`listener`] → [`http`] → [`route`] → [`cluster`] → [`endpoint`], then the small parts they
//! are made of: [`matcher`], [`regex`], [`header`], [`format`], [`access_log`], [`tls`], [`metadata`], [`address`].
//! The conversions from messages live in `read`; the pure matching functions stand beside the types they read:
//! [`chain_match`] (which filter chain takes a connection) and [`route_match`] (which route takes a request).
//! [`call`] strings them together to tell where a call would end.

pub mod access_log;
pub mod address;
pub mod bootstrap;
pub mod call;
pub mod cel;
pub mod chain_match;
pub mod cluster;
pub mod endpoint;
pub mod error;
pub mod ext_authz;
pub mod filter_config;
pub mod filter_state;
pub mod format;
mod format_arguments;
pub mod format_sources;
pub mod format_tls;
pub mod header;
pub mod health_check;
pub mod http;
pub mod http_filter;
pub mod jwt_authn;
pub mod lazy;
pub mod lb;
pub mod listener;
pub mod local_reply;
pub mod matcher;
pub mod matcher_tree;
pub mod metadata;
pub mod network;
pub mod overload;
pub mod proxy_protocol;
pub mod rate_limit;
pub mod rate_limit_service;
pub mod rbac;
pub(crate) mod read;
pub mod regex;
pub mod retry;
pub mod route;
pub mod route_match;
pub mod scoped_route;
pub mod socket;
pub mod tag;
pub mod tls;
pub mod tracing;
pub mod uri_template;

pub use access_log::AccessLog;
pub use address::Address;
pub use bootstrap::Bootstrap;
pub use cluster::Cluster;
pub use endpoint::ClusterLoadAssignment;
pub use error::{PlanError, PlanErrors};
pub use http::HttpConnectionManager;
pub use http_filter::HttpFilter;
pub use lazy::LazyCluster;
pub use listener::{FilterChain, Listener};
pub use matcher::{Fraction, HeaderMatcher, StringMatcher};
pub use metadata::Metadata;
pub use network::{NetworkFilter, TcpProxy};
pub use regex::Regex;
pub use retry::RetryPolicy;
pub use route::{Route, RouteConfiguration, VirtualHost};
