//! Tracing of HTTP requests: sampling and the tags on spans.

use std::collections::BTreeMap;

use proto::{
    envoy::{
        extensions::filters::network::http_connection_manager::v3::http_connection_manager::Tracing,
        r#type::{
            metadata::v3::{
                MetadataKey, MetadataKind, metadata_key, metadata_key::path_segment, metadata_kind,
            },
            tracing::v3::{CustomTag, custom_tag},
            v3::Percent,
        },
    },
    istio::mesh::v1alpha1::{MeshConfig, ProxyConfig, tracing::custom_tag::Type as MeshTag},
};

/// Per cent of new traces that are recorded unless the user says otherwise.
const DEFAULT_SAMPLING: f64 = 1.0;
/// Dynamic metadata of policies that are only tried out, by tag.
const DRY_RUN_TAGS: [(&str, &str); 4] = [
    (
        "allow_policy.name",
        "istio_dry_run_allow_shadow_effective_policy_id",
    ),
    (
        "allow_policy.result",
        "istio_dry_run_allow_shadow_engine_result",
    ),
    (
        "deny_policy.name",
        "istio_dry_run_deny_shadow_effective_policy_id",
    ),
    (
        "deny_policy.result",
        "istio_dry_run_deny_shadow_engine_result",
    ),
];

/// Who the workload is, for its spans.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    pub labels: &'a BTreeMap<String, String>,
    pub namespace: &'a str,
    pub mesh_id: &'a str,
    pub cluster_id: &'a str,
}

/// Tracing as MeshConfig and ProxyConfig ask for it; spans go where the bootstrap says.
pub fn of_mesh(
    mesh: &MeshConfig,
    config: &ProxyConfig,
    workload: &Workload<'_>,
) -> Option<Tracing> {
    if !mesh.enable_tracing {
        return None;
    }
    let own = config.tracing.as_ref();
    let istio_tags = own.and_then(|t| t.enable_istio_tags).unwrap_or(true);
    let mut out = Tracing {
        custom_tags: tags(istio_tags, proxy_config_tags(config), workload),
        max_path_tag_length: own.map(|t| t.max_path_tag_length).filter(|n| *n > 0),
        ..Default::default()
    };
    sample(&mut out, proxy_config_sampling(config));
    Some(out)
}

/// Records `percent` of the traces that begin here, and all that others want recorded.
pub fn sample(tracing: &mut Tracing, percent: f64) {
    let per_cent = |value| Some(Percent { value });
    tracing.client_sampling = per_cent(100.0);
    tracing.overall_sampling = per_cent(100.0);
    tracing.random_sampling = per_cent(percent);
}

/// `ProxyConfig.tracing.sampling`; more than all counts as unset.
pub fn proxy_config_sampling(config: &ProxyConfig) -> f64 {
    match config.tracing.as_ref().map_or(0.0, |t| t.sampling) {
        0.0 => DEFAULT_SAMPLING,
        s if s > 100.0 => DEFAULT_SAMPLING,
        s => s,
    }
}

/// All tags of a span, by name.
pub fn tags(istio: bool, own: Vec<CustomTag>, workload: &Workload<'_>) -> Vec<CustomTag> {
    let mut out = own;
    if istio {
        out.extend(workload_tags(workload));
        out.extend(DRY_RUN_TAGS.map(|(name, key)| dry_run_tag(name, key)));
    }
    out.sort_by(|a, b| a.tag.cmp(&b.tag));
    out
}

/// `ProxyConfig.tracing.customTags`.
pub fn proxy_config_tags(config: &ProxyConfig) -> Vec<CustomTag> {
    let Some(tracing) = &config.tracing else {
        return Vec::new();
    };
    tracing
        .custom_tags
        .iter()
        .filter_map(|(name, tag)| {
            let kind = match tag.r#type.as_ref()? {
                MeshTag::Literal(t) => literal(&t.value),
                MeshTag::Environment(t) => environment(&t.name, &t.default_value),
                MeshTag::Header(t) => header(&t.name, &t.default_value),
            };
            Some(CustomTag {
                tag: name.clone(),
                r#type: Some(kind),
                ..Default::default()
            })
        })
        .collect()
}

/// A tag with a fixed value.
pub fn literal(value: &str) -> custom_tag::Type {
    custom_tag::Type::Literal(custom_tag::Literal {
        value: value.to_owned(),
    })
}

/// A tag from the proxy's environment.
pub fn environment(name: &str, default_value: &str) -> custom_tag::Type {
    custom_tag::Type::Environment(custom_tag::Environment {
        name: name.to_owned(),
        default_value: default_value.to_owned(),
    })
}

/// A tag from a request header.
pub fn header(name: &str, default_value: &str) -> custom_tag::Type {
    custom_tag::Type::RequestHeader(custom_tag::Header {
        name: name.to_owned(),
        default_value: default_value.to_owned(),
    })
}

fn workload_tags(workload: &Workload<'_>) -> [CustomTag; 5] {
    let label = |name: &str, default| workload.labels.get(name).map_or(default, String::as_str);
    let or = |value, default| if str::is_empty(value) { default } else { value };
    [
        (
            "istio.canonical_revision",
            or(label("service.istio.io/canonical-revision", ""), "latest"),
        ),
        (
            "istio.canonical_service",
            or(label("service.istio.io/canonical-name", ""), "unknown"),
        ),
        ("istio.mesh_id", or(workload.mesh_id, "unknown")),
        ("istio.namespace", or(workload.namespace, "default")),
        ("istio.cluster_id", or(workload.cluster_id, "unknown")),
    ]
    .map(|(name, value)| CustomTag {
        tag: name.to_owned(),
        r#type: Some(literal(value)),
        ..Default::default()
    })
}

fn dry_run_tag(name: &str, key: &str) -> CustomTag {
    let path = metadata_key::PathSegment {
        segment: Some(path_segment::Segment::Key(key.to_owned())),
    };
    CustomTag {
        tag: format!("istio.authorization.dry_run.{name}"),
        r#type: Some(custom_tag::Type::Metadata(custom_tag::Metadata {
            kind: Some(MetadataKind {
                kind: Some(metadata_kind::Kind::Request(metadata_kind::Request {})),
            }),
            metadata_key: Some(MetadataKey {
                key: "envoy.filters.http.rbac".to_owned(),
                path: vec![path],
            }),
            ..Default::default()
        })),
        ..Default::default()
    }
}
