//! What the server asks of translation.
//!
//! Resources fall in three parts, so that a fleet costs little: what all proxies of a view share (outbound clusters and
//! listeners), what belongs to one proxy (inbound clusters and listeners), and what is asked for by name (endpoints,
//! routes), which is shared by view again.

use xds::type_url::NDS;

use crate::model::{Mesh, Proxy, Resource};

/// A pure function of mesh and proxy: the same input gives the same bytes.
pub trait Translate: Send + Sync + 'static {
    /// The resources of a type wanted whole (CDS, LDS, NDS) that every proxy of the same view gets.
    fn shared(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy) -> Vec<Resource>;

    /// The resources of such a type that are this proxy's alone.
    fn own(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy) -> Vec<Resource>;

    /// The resources of a type wanted by name (EDS, RDS); names that do not exist are left out.
    fn named(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy, names: &[&str]) -> Vec<Resource>;
}

/// Istio's translation.
#[derive(Debug)]
pub struct Istio;

impl Translate for Istio {
    fn shared(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
        match type_url {
            NDS => crate::names_table::build(mesh, proxy),
            _ => Vec::new(),
        }
    }

    fn own(&self, _type_url: &str, _mesh: &Mesh, _proxy: &Proxy) -> Vec<Resource> {
        Vec::new()
    }

    fn named(
        &self,
        _type_url: &str,
        _mesh: &Mesh,
        _proxy: &Proxy,
        _names: &[&str],
    ) -> Vec<Resource> {
        Vec::new()
    }
}
