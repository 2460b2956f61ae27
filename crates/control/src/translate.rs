//! What the server asks of translation.
//!
//! Resources fall in three parts, so that a fleet costs little: what all proxies of a view share (outbound clusters and
//! listeners), what belongs to one proxy (inbound clusters and listeners), and what is asked for by name (endpoints,
//! routes), which is shared by view again.

use xds::type_url::{CDS, EDS, LDS, NDS, RDS};

use crate::{
    cluster, endpoint, grpc,
    listener::{self, Shared},
    model::{Mesh, Proxy, Resource},
    names_table, route,
};

/// A pure function of mesh and proxy: the same input gives the same bytes.
pub trait Translate: Send + Sync + 'static {
    /// The resources of a type wanted whole (CDS, LDS, NDS) that every proxy of the same view gets, the
    /// pod aside that one of them leads to.
    fn shared(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy) -> Vec<Shared>;

    /// The resources of such a type that are this proxy's alone.
    fn own(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy) -> Vec<Resource>;

    /// The resources of a type wanted by name (EDS, RDS); names that do not exist are left out.
    fn named(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy, names: &[&str]) -> Vec<Resource>;
}

/// Istio's translation.
#[derive(Debug)]
pub struct Istio;

impl Translate for Istio {
    fn shared(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy) -> Vec<Shared> {
        let all = |resources: Vec<Resource>| {
            resources
                .into_iter()
                .map(|resource| Shared {
                    resource,
                    of_pod: None,
                })
                .collect()
        };
        match type_url {
            CDS => all(cluster::outbound(mesh, proxy)),
            LDS if !proxy.is_router() => listener::outbound(mesh, proxy),
            NDS => all(names_table::build(mesh, proxy)),
            _ => Vec::new(),
        }
    }

    fn own(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
        match type_url {
            CDS => cluster::inbound(mesh, proxy),
            LDS if proxy.is_router() => listener::build(mesh, proxy),
            LDS => listener::own(mesh, proxy),
            _ => Vec::new(),
        }
    }

    fn named(&self, type_url: &str, mesh: &Mesh, proxy: &Proxy, names: &[&str]) -> Vec<Resource> {
        if grpc::is_grpc(&proxy.node) {
            return match type_url {
                CDS => grpc::clusters(mesh, proxy, names),
                EDS => grpc::endpoints(mesh, proxy, names),
                LDS => grpc::listeners(mesh, proxy, names),
                RDS => grpc::routes(mesh, proxy, names),
                _ => Vec::new(),
            };
        }
        match type_url {
            EDS => endpoint::build(mesh, proxy, names.iter().copied()),
            RDS => {
                let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
                route::build(mesh, proxy, &names)
            }
            _ => Vec::new(),
        }
    }
}
