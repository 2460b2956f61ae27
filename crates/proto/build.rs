//! Generates the Rust types and the tables behind JSON from the committed descriptor sets: no protoc, no network.

#[path = "build/schema.rs"]
mod schema;

use std::{env, fs, io, path::PathBuf};

use prost::Message;
use prost_types::FileDescriptorSet;

/// Services that some room speaks; code for the others would only cost build time.
const SERVICES: &[&str] = &[
    "AccessLogService",
    "AggregatedDiscoveryService",
    "Authorization",
    "ClientStatusDiscoveryService",
    "ExternalProcessor",
    "HealthDiscoveryService",
    "IstioCertificateService",
    "LoadReportingService",
    "LogsService",
    "MetricsService",
    "RateLimitService",
    "SecretDiscoveryService",
    "TraceService",
];

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=descriptors");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    let mut set = FileDescriptorSet::default();
    for name in ["envoy", "istio"] {
        let path = format!("descriptors/{name}.binpb");
        let part = FileDescriptorSet::decode(fs::read(&path)?.as_slice())
            .map_err(|e| io::Error::other(format!("{path}: {e}")))?;
        set.file.extend(part.file);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("schema.bin"), schema::pack(&set))?;

    for file in &mut set.file {
        file.service.retain(|s| SERVICES.contains(&s.name()));
    }
    let mut config = prost_build::Config::new();
    config
        .enable_type_names()
        // Sorted maps: the same message always encodes to the same bytes, so a content hash is a version.
        .btree_map(["."])
        .type_name_domain(["."], "type.googleapis.com")
        .include_file("all.rs");
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds_with_config(set, config)
}
