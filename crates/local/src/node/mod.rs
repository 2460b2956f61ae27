//! The network between pods: what a node's kernel, kube-proxy and the cluster's name server do.
//!
//! All of it lives in the supervisor's own network namespace. Pods hang on a bridge there, but with addresses of their
//! own (/32) and the node as their only neighbour, so that every packet passes the node's routing and its translation
//! of service addresses, both ways.

pub(crate) mod dns;
pub(crate) mod forward;
pub(crate) mod network;
pub(crate) mod services;
