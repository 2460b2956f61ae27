//! HTTP protocol options of clusters: the extension's message, or the deprecated fields.

use proto::envoy::{
    config::core::v3 as core,
    extensions::filters::network::http_connection_manager::v3 as network_filter,
    extensions::upstreams::http::v3::{self as upstream, http_protocol_options as upstream_nested},
};

use network_filter::http_filter::ConfigType;

use super::{
    common::extension,
    http::{default_http1, http_options, http1_options, http2_options},
};
use crate::plan::{
    cluster::{AutoSni, UpstreamProtocol},
    error::{At, Step, unsupported},
    http::{Http1Options, Http2Options, HttpOptions},
};

const HTTP_PROTOCOL_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// What the options message (or the deprecated fields) say about HTTP.
pub(super) struct Protocol {
    pub(super) protocol: UpstreamProtocol,
    pub(super) http: HttpOptions,
    pub(super) http1: Http1Options,
    pub(super) http2: Http2Options,
    pub(super) auto_sni: Option<AutoSni>,
}

/// The deprecated fields of a cluster.
pub(super) struct Legacy<'a> {
    pub(super) upstream: &'a Option<core::UpstreamHttpProtocolOptions>,
    pub(super) common: &'a Option<core::HttpProtocolOptions>,
    pub(super) http1: &'a Option<core::Http1ProtocolOptions>,
    pub(super) http2: &'a Option<core::Http2ProtocolOptions>,
    pub(super) selection: i32,
}

pub(super) fn protocol_options(
    at: &At<'_>,
    map: &std::collections::BTreeMap<String, proto::Any>,
    legacy: Legacy<'_>,
) -> Step<Protocol> {
    let options_at = at.field("typed_extension_protocol_options");
    for name in map.keys().filter(|n| *n != HTTP_PROTOCOL_OPTIONS) {
        options_at
            .key(name)
            .not_implemented("is not implemented; remove it");
    }
    if let Some(any) = map.get(HTTP_PROTOCOL_OPTIONS) {
        let at = options_at.key(HTTP_PROTOCOL_OPTIONS);
        let found = extension(&at, any)?;
        if found.name != HTTP_PROTOCOL_OPTIONS {
            return Err(at.error(format!("must be a {HTTP_PROTOCOL_OPTIONS}")));
        }
        return http_protocol_options(at, &found.decode(&at)?);
    }
    let protocol = match (legacy.selection, legacy.http2) {
        (1, http2) => UpstreamProtocol::Downstream {
            http2: http2.is_some(),
        },
        (_, Some(_)) => UpstreamProtocol::Http2,
        (_, None) => UpstreamProtocol::Http1,
    };
    let http = at.optional("common_http_protocol_options", legacy.common, http_options)?;
    let http1 = at.optional("http_protocol_options", legacy.http1, http1_options)?;
    let http2 = at.optional("http2_protocol_options", legacy.http2, http2_options)?;
    Ok(Protocol {
        protocol,
        http: http.unwrap_or_default(),
        http1: http1.unwrap_or_else(default_http1),
        http2: http2.unwrap_or_default(),
        auto_sni: at
            .optional("upstream_http_protocol_options", legacy.upstream, auto_sni)?
            .flatten(),
    })
}

fn http_protocol_options(at: At<'_>, m: &upstream::HttpProtocolOptions) -> Step<Protocol> {
    use upstream_nested::{
        UpstreamProtocolOptions as U, explicit_http_config::ProtocolConfig as P,
    };
    let upstream::HttpProtocolOptions {
        common_http_protocol_options,
        upstream_http_protocol_options,
        http_filters,
        header_validation_config,
        outlier_detection,
        request_mirror_policies,
        hash_policy,
        retry_policy,
        upstream_protocol_options,
    } = m;
    unsupported!(
        at,
        header_validation_config,
        outlier_detection,
        request_mirror_policies,
        hash_policy,
        retry_policy,
    );
    // The codec alone is what a cluster without filters has.
    for (index, filter) in http_filters.iter().enumerate() {
        let name = match &filter.config_type {
            Some(ConfigType::TypedConfig(any)) => proto::any::type_name(&any.type_url),
            _ => "",
        };
        if name != "envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec" {
            let at = at.field("http_filters");
            at.index(index)
                .not_implemented("upstream HTTP filters are not implemented; remove it");
        }
    }
    let (protocol, http1, http2) = match upstream_protocol_options {
        Some(U::ExplicitHttpConfig(m)) => {
            let at = at.field("explicit_http_config");
            match &m.protocol_config {
                Some(P::HttpProtocolOptions(m)) => {
                    let options = http1_options(at.field("http_protocol_options"), m)?;
                    (UpstreamProtocol::Http1, Some(options), None)
                }
                Some(P::Http2ProtocolOptions(m)) => {
                    let options = http2_options(at.field("http2_protocol_options"), m)?;
                    (UpstreamProtocol::Http2, None, Some(options))
                }
                Some(P::Http3ProtocolOptions(_)) => {
                    return Err(at
                        .field("http3_protocol_options")
                        .not_implemented("is not implemented; write http2_protocol_options"));
                }
                None => {
                    return Err(
                        at.error("needs one of http_protocol_options, http2_protocol_options")
                    );
                }
            }
        }
        Some(U::UseDownstreamProtocolConfig(m)) => {
            let at = at.field("use_downstream_protocol_config");
            let http3_protocol_options = &m.http3_protocol_options;
            unsupported!(at, http3_protocol_options);
            let http1 = at.optional(
                "http_protocol_options",
                &m.http_protocol_options,
                http1_options,
            )?;
            let http2 = at.optional(
                "http2_protocol_options",
                &m.http2_protocol_options,
                http2_options,
            )?;
            let protocol = UpstreamProtocol::Downstream {
                http2: http2.is_some(),
            };
            (protocol, http1, http2)
        }
        Some(U::AutoConfig(m)) => {
            let at = at.field("auto_config");
            let http3_protocol_options = &m.http3_protocol_options;
            let alternate_protocols_cache_options = &m.alternate_protocols_cache_options;
            unsupported!(
                at,
                http3_protocol_options,
                alternate_protocols_cache_options
            );
            let http1 = at.optional(
                "http_protocol_options",
                &m.http_protocol_options,
                http1_options,
            )?;
            let http2 = at.optional(
                "http2_protocol_options",
                &m.http2_protocol_options,
                http2_options,
            )?;
            (UpstreamProtocol::Alpn, http1, http2)
        }
        None => {
            return Err(at.error(
                "needs one of explicit_http_config, use_downstream_protocol_config, auto_config",
            ));
        }
    };
    let http = at.optional(
        "common_http_protocol_options",
        common_http_protocol_options,
        http_options,
    )?;
    Ok(Protocol {
        protocol,
        http: http.unwrap_or_default(),
        http1: http1.unwrap_or_else(default_http1),
        http2: http2.unwrap_or_default(),
        auto_sni: at
            .optional(
                "upstream_http_protocol_options",
                upstream_http_protocol_options,
                auto_sni,
            )?
            .flatten(),
    })
}

fn auto_sni(at: At<'_>, m: &core::UpstreamHttpProtocolOptions) -> Step<Option<AutoSni>> {
    let core::UpstreamHttpProtocolOptions {
        auto_sni,
        auto_san_validation,
        override_auto_sni_header,
    } = m;
    if *auto_san_validation && !auto_sni {
        at.field("auto_san_validation")
            .not_implemented("is taken together with auto_sni alone; set that too");
    }
    Ok(auto_sni.then(|| AutoSni {
        header: (!override_auto_sni_header.is_empty())
            .then(|| override_auto_sni_header.to_ascii_lowercase().into()),
        validate: *auto_san_validation,
    }))
}
