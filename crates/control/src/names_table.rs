//! NDS: the names that the agent's DNS proxy answers for, with the addresses that listeners exist for.

use std::collections::BTreeMap;

use proto::istio::networking::nds::v1::{NameTable, name_table::NameInfo};

use crate::model::{Mesh, Proxy, Registry, Resolution, Resource, host, service::UNSPECIFIED};

/// The one table of a proxy's view; under the empty name, as istiod sends it.
pub(crate) fn build(mesh: &Mesh, proxy: &Proxy) -> Vec<Resource> {
    let mut table: BTreeMap<String, NameInfo> = BTreeMap::new();
    let mut from = Vec::new();
    for service in &proxy.scope.services {
        let mut ips: Vec<String> = service
            .addresses_for(proxy)
            .into_iter()
            .filter(|a| a != UNSPECIFIED && a.parse::<std::net::IpAddr>().is_ok())
            .collect();
        if ips.is_empty() && service.resolution == Resolution::Passthrough {
            let mut endpoints: Vec<_> = mesh.all_endpoints(service).map(|(_, e)| e).collect();
            endpoints.retain(|e| e.address.parse::<std::net::IpAddr>().is_ok());
            for e in &endpoints {
                // Pods of a StatefulSet have names of their own below the service's.
                if !e.hostname.is_empty() && e.subdomain == service.name {
                    let info = table
                        .entry(format!("{}.{}", e.hostname, service.hostname))
                        .or_insert_with(|| NameInfo {
                            registry: "Kubernetes".to_owned(),
                            namespace: service.namespace.clone(),
                            shortname: format!("{}.{}", e.hostname, service.name),
                            ..NameInfo::default()
                        });
                    if !info.ips.contains(&e.address) {
                        info.ips.push(e.address.clone());
                    }
                }
                if !ips.contains(&e.address) {
                    ips.push(e.address.clone());
                }
            }
        }
        if ips.is_empty()
            || (host::is_wildcard(&service.hostname) && service.registry == Registry::Kubernetes)
        {
            continue;
        }
        let kubernetes = service.registry == Registry::Kubernetes;
        from.push(service.origin.clone());
        table
            .entry(service.hostname.clone())
            .or_insert_with(|| NameInfo {
                ips,
                registry: if kubernetes { "Kubernetes" } else { "External" }.to_owned(),
                shortname: if kubernetes {
                    service.name.clone()
                } else {
                    String::new()
                },
                namespace: if kubernetes {
                    service.namespace.clone()
                } else {
                    String::new()
                },
                alt_hosts: Vec::new(),
            });
    }
    let message = NameTable {
        table,
        name_info: None,
    };
    vec![Resource::new("", &message, from)]
}
