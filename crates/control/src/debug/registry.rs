//! The services and endpoints of the model.

use serde_json::{Value, json};

use crate::model::{Endpoint, Health, Mesh, Registry, Service};

/// `/debug/registryz`.
pub(super) fn services(mesh: &Mesh) -> Value {
    mesh.services().iter().map(|s| service(s)).collect()
}

/// `/debug/endpointz`: per service and port.
pub(super) fn endpoints(mesh: &Mesh) -> Value {
    let mut out = Vec::new();
    for service in mesh.services().iter() {
        for port in &service.ports {
            let all: Vec<Value> = mesh
                .endpoints(service, port.number)
                .iter()
                .map(|e| endpoint(mesh, service, e))
                .collect();
            out.push(json!({
                "svc": format!("{}:{}", service.hostname, port.name),
                "namespace": service.namespace,
                "ep": all,
            }));
        }
    }
    Value::Array(out)
}

fn service(service: &Service) -> Value {
    let ports: Vec<Value> = service
        .ports
        .iter()
        .map(|p| json!({"name": p.name, "port": p.number, "protocol": p.protocol.name()}))
        .collect();
    json!({
        "hostname": service.hostname,
        "defaultAddress": service.default_address,
        "clusterVIPs": service.cluster_ips,
        "ports": ports,
        "MeshExternal": service.mesh_external,
        "Resolution": format!("{:?}", service.resolution),
        "Attributes": {
            "ServiceRegistry": match service.registry {
                Registry::Kubernetes => "Kubernetes",
                Registry::External => "External",
            },
            "Name": service.name,
            "Namespace": service.namespace,
            "Labels": service.labels,
            "LabelSelectors": service.selector,
        },
        "from": service.origin.to_string(),
    })
}

fn endpoint(mesh: &Mesh, service: &Service, endpoint: &Endpoint) -> Value {
    json!({
        "endpoint": {
            "Address": endpoint.address,
            "ServicePortName": endpoint.port_name,
            "EndpointPort": endpoint.port,
            "Labels": *endpoint.labels,
            "ServiceAccount": endpoint.service_account,
            "Locality": {"Label": endpoint.locality, "ClusterID": mesh.cluster_id()},
            "LbWeight": endpoint.weight,
            "Network": endpoint.network,
            "TLSMode": endpoint.tls_mode,
            "Namespace": endpoint.namespace,
            "WorkloadName": endpoint.workload_name,
            "NodeName": endpoint.node_name,
            "HealthStatus": match endpoint.health {
                Health::Unknown | Health::Healthy => "Healthy",
                Health::Unhealthy => "UnHealthy",
                Health::Draining => "Draining",
                Health::Terminating => "Terminating",
            },
        },
        "service": service.hostname,
    })
}
