//! What a proxy reports about its traffic: access logs, traces, statistics. MeshConfig says what by default; Telemetry
//! objects of the root namespace, of the proxy's namespace and for its workload say more, the later over the earlier.

mod logs;
mod metrics;
mod traces;

use std::sync::Arc;

use config::{Object, labels_match};
use proto::{
    envoy::config::listener::v3::Filter,
    istio::{
        mesh::v1alpha1::{
            ProxyConfig,
            mesh_config::{ExtensionProvider, extension_provider::Provider},
        },
        telemetry::v1alpha1::{ProviderRef, Telemetry, WorkloadMode},
    },
};

use super::{
    env::{CLASSES, Reports},
    filters,
    settings::Class,
    tracing::Workload,
};
use crate::{
    model::{Mesh, Proxy},
    names,
};

/// Name of the statistics filters, HTTP and network.
const STATS: &str = "istio.stats";

/// The reports of every side.
pub(super) fn reports(mesh: &Mesh, proxy: &Proxy, config: &ProxyConfig) -> [Reports; 3] {
    let workload = Workload {
        labels: &proxy.labels,
        namespace: proxy.node.meta("NAMESPACE").unwrap_or_default(),
        mesh_id: proxy.node.meta("MESH_ID").unwrap_or_default(),
        cluster_id: proxy.node.meta("CLUSTER_ID").unwrap_or_default(),
    };
    let applied = Applied {
        mesh,
        proxy,
        config,
        workload,
        objects: objects(mesh, proxy),
    };
    CLASSES.map(|class| applied.reports(class))
}

/// The objects that apply to a proxy, with all that they are read against.
struct Applied<'a> {
    mesh: &'a Mesh,
    proxy: &'a Proxy,
    config: &'a ProxyConfig,
    workload: Workload<'a>,
    /// Of the root namespace, of the proxy's own, for its workload.
    objects: Vec<&'a Object<Telemetry>>,
}

impl Applied<'_> {
    fn reports(&self, class: Class) -> Reports {
        let (tracing, request_id_for_sampling) = self.tracing(class);
        let stats = self.statistics(class);
        let http = stats
            .iter()
            .map(|config| filters::http(STATS, config.clone()))
            .collect();
        let tcp: Vec<Filter> = stats
            .iter()
            .map(|config| filters::network(STATS, config.clone()))
            .collect();
        Reports {
            logs: self.logs(class),
            tracing,
            request_id_for_sampling,
            http_stats: http,
            tcp_stats: tcp,
        }
    }

    /// A provider by its name, in any case.
    fn provider(&self, name: &str) -> Option<&ExtensionProvider> {
        let all = &self.mesh.config().extension_providers;
        all.iter().find(|p| p.name.eq_ignore_ascii_case(name))
    }

    /// The providers of a kind of report that MeshConfig names (`defaultProviders`).
    fn default_providers(&self, kind: Kind) -> Vec<&str> {
        let Some(all) = &self.mesh.config().default_providers else {
            return Vec::new();
        };
        let names = match kind {
            Kind::Tracing => &all.tracing,
            Kind::Metrics => &all.metrics,
            Kind::AccessLogging => &all.access_logging,
        };
        names.iter().map(String::as_str).collect()
    }

    /// The cluster and host of a provider's service. Without a namespace the host must be the only one of its name.
    fn destination(&self, provider: &str, service: &str, port: u32) -> Option<Destination> {
        let services = self.mesh.services();
        let found: Vec<_> = match service.split_once('/') {
            Some((namespace, host)) => services.get(host, namespace).into_iter().collect(),
            None => services.of_host(service).collect(),
        };
        let [only] = found.as_slice() else {
            tracing::warn!(
                "extension provider {provider:?} is left out: {} service is called {service:?}; \
                 name one as NAMESPACE/HOST in MeshConfig.extensionProviders",
                if found.is_empty() {
                    "no"
                } else {
                    "more than one"
                }
            );
            return None;
        };
        Some(Destination {
            host: only.hostname.clone(),
            cluster: names::outbound_cluster(port, "", &only.hostname),
        })
    }
}

/// Where a provider's reports go.
struct Destination {
    host: String,
    cluster: String,
}

/// A kind of report.
#[derive(Clone, Copy)]
enum Kind {
    Tracing,
    Metrics,
    AccessLogging,
}

/// On which side of a call a class of listeners is.
fn mode_of(class: Class) -> WorkloadMode {
    if class == Class::Inbound {
        WorkloadMode::Server
    } else {
        WorkloadMode::Client
    }
}

/// Whether something that is meant for `wanted` is meant for `mode`.
fn covers(wanted: WorkloadMode, mode: WorkloadMode) -> bool {
    wanted == WorkloadMode::ClientAndServer || wanted == mode
}

fn provider_names(providers: &[ProviderRef]) -> Vec<&str> {
    providers.iter().map(|p| p.name.as_str()).collect()
}

fn prometheus(provider: &ExtensionProvider) -> bool {
    matches!(provider.provider, Some(Provider::Prometheus(_)))
}

/// The oldest object without a selector of each namespace counts, and all whose selector takes the workload.
fn objects<'a>(mesh: &'a Mesh, proxy: &Proxy) -> Vec<&'a Object<Telemetry>> {
    let root = mesh.root_namespace();
    let own = proxy.namespace();
    let all = mesh.snapshot().telemetries.by_age();
    let of = |namespace: &str| {
        let namespace = namespace.to_owned();
        all.iter()
            .filter(move |o| o.meta.namespace == namespace)
            .map(|o| Arc::as_ref(o))
    };
    let everywhere = |namespace: &str| of(namespace).find(|o| is_for_all(&o.spec));
    let mut out: Vec<&Object<Telemetry>> = Vec::new();
    out.extend(everywhere(root));
    if own != root {
        out.extend(everywhere(own));
    }
    out.extend(of(own).filter(|o| {
        let selector = o.spec.selector.as_ref().map(|s| &s.match_labels);
        selector.is_some_and(|s| !s.is_empty() && labels_match(s, &proxy.labels))
    }));
    out
}

fn is_for_all(spec: &Telemetry) -> bool {
    spec.selector
        .as_ref()
        .is_none_or(|s| s.match_labels.is_empty())
        && spec.target_ref.is_none()
        && spec.target_refs.is_empty()
}
