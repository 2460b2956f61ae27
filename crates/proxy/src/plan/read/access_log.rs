//! Access logs.

use std::sync::Arc;

use proto::{
    Struct,
    envoy::{
        config::{accesslog::v3 as pb, core::v3 as core},
        data::accesslog::v3 as data,
        extensions::{
            access_loggers::{
                file::v3 as file, filters::cel::v3::ExpressionFilter, stream::v3 as stream,
            },
            formatter::generic_secret::v3::GenericSecret,
        },
    },
};
use serde_json::Value;

use super::{
    common::{
        enumeration, extension, fraction, header_matcher, json, metadata_matcher, typed_config,
    },
    log_service,
    route::option,
    tls::sds,
};
use crate::plan::{
    access_log::{
        AccessLog, AccessLogFilter, Comparison, ComparisonOp, JsonNode, LogFormat, LogOutput,
        LogSink,
    },
    error::{At, Step},
    format::Template,
    format_sources::{self, Formatters},
    matcher::Fraction,
    route::BodyFormat,
};

/// Envoy's own format, where none is configured.
const DEFAULT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
    %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
    %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
    \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// `AccessLog`.
pub(super) fn access_log(at: At<'_>, m: &pb::AccessLog) -> Step<AccessLog> {
    let filter = at.optional("filter", &m.filter, filter);
    let Some(pb::access_log::ConfigType::TypedConfig(any)) = &m.config_type else {
        return Err(at
            .field("typed_config")
            .error("is required: the configuration of this log with its @type"));
    };
    let at = at.field("typed_config");
    let found = extension(&at, any)?;
    let lines = |(sink, format)| LogOutput::Lines { sink, format };
    let output = match found.name.as_str() {
        "envoy.extensions.access_loggers.file.v3.FileAccessLog" => {
            lines(file_log(at, &found.decode(&at)?)?)
        }
        "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog" => {
            let m: stream::StdoutAccessLog = found.decode(&at)?;
            let format = m
                .access_log_format
                .map(|stream::stdout_access_log::AccessLogFormat::LogFormat(f)| f);
            lines((LogSink::Stdout, log_format_or_default(at, format.as_ref())?))
        }
        "envoy.extensions.access_loggers.stream.v3.StderrAccessLog" => {
            let m: stream::StderrAccessLog = found.decode(&at)?;
            let format = m
                .access_log_format
                .map(|stream::stderr_access_log::AccessLogFormat::LogFormat(f)| f);
            lines((LogSink::Stderr, log_format_or_default(at, format.as_ref())?))
        }
        "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig" => {
            LogOutput::Grpc(Arc::new(log_service::http(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig" => {
            LogOutput::Grpc(Arc::new(log_service::tcp(at, &found.decode(&at)?)?))
        }
        "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig" => {
            let log = log_service::open_telemetry(at, &found.decode(&at)?)?;
            LogOutput::OpenTelemetry(Arc::new(log))
        }
        _ => return Err(found.unknown(&at, "access log")),
    };
    Ok(AccessLog {
        name: m.name.as_str().into(),
        filter: filter?,
        output,
    })
}

fn file_log(at: At<'_>, m: &file::FileAccessLog) -> Step<(LogSink, LogFormat)> {
    use file::file_access_log::AccessLogFormat as F;
    let path = at.text("path", &m.path)?;
    let sink = match &*path {
        "/dev/stdout" => LogSink::Stdout,
        "/dev/stderr" => LogSink::Stderr,
        path => LogSink::File(path.into()),
    };
    let none = Formatters::default();
    let format = match &m.access_log_format {
        None => log_format_or_default(at, None)?,
        Some(F::Format(text)) => text_format(at.field("format"), text, false, &none)?,
        Some(F::JsonFormat(m)) => json_format(at.field("json_format"), m, false, &none)?,
        Some(F::TypedJsonFormat(m)) => json_format(at.field("typed_json_format"), m, false, &none)?,
        Some(F::LogFormat(m)) => log_format_or_default(at, Some(m))?,
    };
    Ok((sink, format))
}

fn log_format_or_default(
    at: At<'_>,
    m: Option<&core::SubstitutionFormatString>,
) -> Step<LogFormat> {
    match m {
        Some(m) => log_format(at.field("log_format"), m),
        None => text_format(at, DEFAULT, false, &Formatters::default()),
    }
}

/// The format of a body.
pub(super) fn body_format(at: At<'_>, m: &core::SubstitutionFormatString) -> Step<BodyFormat> {
    Ok(BodyFormat {
        format: log_format(at, m)?,
        content_type: option(&m.content_type),
    })
}

/// A format that is given in place.
fn log_format(at: At<'_>, m: &core::SubstitutionFormatString) -> Step<LogFormat> {
    let more = formatters(&at, &m.formatters);
    format_with(at, m, &more)
}

fn format_with(
    at: At<'_>,
    m: &core::SubstitutionFormatString,
    more: &Formatters,
) -> Step<LogFormat> {
    use core::{data_source::Specifier, substitution_format_string::Format as F};
    let core::SubstitutionFormatString {
        omit_empty_values,
        content_type: _,
        formatters: _,
        // Members are always sorted.
        json_format_options: _,
        format,
    } = m;
    let text_format = |at, text: &str| text_format(at, text, *omit_empty_values, more);
    match format {
        Some(F::TextFormat(text)) => text_format(at.field("text_format"), text),
        Some(F::JsonFormat(m)) => json_format(at.field("json_format"), m, *omit_empty_values, more),
        Some(F::TextFormatSource(m)) => {
            let at = at.field("text_format_source");
            match &m.specifier {
                Some(Specifier::InlineString(text)) => text_format(at.field("inline_string"), text),
                Some(Specifier::InlineBytes(bytes)) => {
                    let text = std::str::from_utf8(bytes)
                        .map_err(|_| at.field("inline_bytes").error("must be UTF-8"))?;
                    text_format(at.field("inline_bytes"), text)
                }
                _ => Err(at.error("must be given in place: inline_string")),
            }
        }
        None => Err(at.error("needs one of text_format_source, json_format")),
    }
}

/// What formatters allow; the operators of others are built in here.
pub(super) fn formatters(at: &At<'_>, formatters: &[core::TypedExtensionConfig]) -> Formatters {
    let mut all = Formatters::default();
    at.each("formatters", formatters, |at, m| {
        let found = typed_config(&at, &m.typed_config, "formatter")?;
        let at = at.field("typed_config");
        match found.name.as_str() {
            "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery"
            | "envoy.extensions.formatter.metadata.v3.Metadata"
            | "envoy.extensions.formatter.cel.v3.Cel" => {}
            "envoy.extensions.formatter.file_content.v3.FileContent" => all.file_content = true,
            "envoy.extensions.formatter.generic_secret.v3.GenericSecret" => {
                let m: GenericSecret = found.decode(&at)?;
                let at = at.field("secret_configs");
                for (name, m) in &m.secret_configs {
                    all.secrets.insert(name.clone(), sds(at.key(name), m)?);
                }
            }
            _ => return Err(found.unknown(&at, "formatter")),
        }
        Ok(())
    });
    all
}

/// Formatters of a place for which nobody follows files and secrets.
pub(super) fn plain_formatters(at: &At<'_>, list: &[core::TypedExtensionConfig]) {
    if formatters(at, list) != Formatters::default() {
        at.field("formatters").not_implemented(
            "file_content and generic_secret are implemented in listeners' logs and replies alone",
        );
    }
}

/// A log outside of listeners, for which nobody follows files and secrets.
pub(super) fn plain_access_log(at: At<'_>, m: &pb::AccessLog) -> Step<AccessLog> {
    let log = access_log(at, m)?;
    let mut found = Vec::new();
    format_sources::of_log(&log, &mut found);
    match &*found {
        [] => Ok(log),
        _ => Err(at.not_implemented(
            "%FILE_CONTENT% and %SECRET% are implemented in listeners' logs and replies alone",
        )),
    }
}

/// The format of a body of a route, for which nobody follows files and secrets.
pub(super) fn plain_body_format(
    at: At<'_>,
    m: &core::SubstitutionFormatString,
) -> Step<BodyFormat> {
    Ok(BodyFormat {
        format: plain_log_format(at, m)?,
        content_type: option(&m.content_type),
    })
}

/// A format outside of listeners' logs and replies.
pub(super) fn plain_log_format(at: At<'_>, m: &core::SubstitutionFormatString) -> Step<LogFormat> {
    plain_formatters(&at, &m.formatters);
    format_with(at, m, &Formatters::default())
}

fn text_format(
    at: At<'_>,
    text: &str,
    omit_empty_values: bool,
    more: &Formatters,
) -> Step<LogFormat> {
    let template = Template::parse_with(text, more).map_err(|why| at.error(why))?;
    Ok(LogFormat::Text {
        template,
        omit_empty_values,
    })
}

fn json_format(
    at: At<'_>,
    m: &Struct,
    omit_empty_values: bool,
    more: &Formatters,
) -> Step<LogFormat> {
    Ok(LogFormat::Json {
        root: json_node(at, &json(m), more)?,
        omit_empty_values,
    })
}

fn json_node(at: At<'_>, value: &Value, more: &Formatters) -> Step<JsonNode> {
    Ok(match value {
        Value::String(text) => {
            JsonNode::Template(Template::parse_with(text, more).map_err(|why| at.error(why))?)
        }
        Value::Array(list) => JsonNode::List(
            list.iter()
                .enumerate()
                .map(|(index, value)| json_node(at.index(index), value, more))
                .collect::<Step<_>>()?,
        ),
        Value::Object(members) => {
            let mut list = members
                .iter()
                .map(|(key, value)| Ok((key.as_str().into(), json_node(at.key(key), value, more)?)))
                .collect::<Step<Vec<(Box<str>, JsonNode)>>>()?;
            list.sort_by(|a, b| a.0.cmp(&b.0));
            JsonNode::Object(list)
        }
        other => JsonNode::Literal(other.to_string().into()),
    })
}

/// `AccessLogFilter`.
pub(super) fn filter(at: At<'_>, m: &pb::AccessLogFilter) -> Step<AccessLogFilter> {
    use pb::access_log_filter::FilterSpecifier as F;
    Ok(match &m.filter_specifier {
        Some(F::StatusCodeFilter(m)) => AccessLogFilter::StatusCode(
            at.field("status_code_filter")
                .required("comparison", &m.comparison, comparison)?,
        ),
        Some(F::DurationFilter(m)) => AccessLogFilter::Duration(
            at.field("duration_filter")
                .required("comparison", &m.comparison, comparison)?,
        ),
        Some(F::NotHealthCheckFilter(_)) => AccessLogFilter::NotHealthCheck,
        Some(F::TraceableFilter(_)) => AccessLogFilter::Traceable,
        Some(F::RuntimeFilter(m)) => AccessLogFilter::Fraction {
            fraction: at
                .field("runtime_filter")
                .optional("percent_sampled", &m.percent_sampled, fraction)?
                .unwrap_or(Fraction::NONE),
            use_independent_randomness: m.use_independent_randomness,
        },
        Some(F::AndFilter(m)) => {
            AccessLogFilter::And(at.field("and_filter").each("filters", &m.filters, filter))
        }
        Some(F::OrFilter(m)) => {
            AccessLogFilter::Or(at.field("or_filter").each("filters", &m.filters, filter))
        }
        Some(F::HeaderFilter(m)) => AccessLogFilter::Header(at.field("header_filter").required(
            "header",
            &m.header,
            header_matcher,
        )?),
        Some(F::ResponseFlagFilter(m)) => {
            let at = at.field("response_flag_filter");
            AccessLogFilter::ResponseFlags(at.each("flags", &m.flags, |at, flag| {
                if !RESPONSE_FLAGS.contains(&flag.as_str()) {
                    return Err(at.error(format!("`{flag}` is not a response flag")));
                }
                Ok(flag.as_str().into())
            }))
        }
        Some(F::GrpcStatusFilter(m)) => {
            let at = at.field("grpc_status_filter");
            let statuses = at.each("statuses", &m.statuses, |at, status| {
                u8::try_from(*status)
                    .ok()
                    .filter(|s| *s <= 16)
                    .ok_or_else(|| at.error("is not a gRPC status"))
            });
            AccessLogFilter::GrpcStatus {
                statuses,
                exclude: m.exclude,
            }
        }
        Some(F::MetadataFilter(m)) => {
            let at = at.field("metadata_filter");
            AccessLogFilter::Metadata {
                matcher: at.required("matcher", &m.matcher, metadata_matcher)?,
                match_if_key_not_found: m.match_if_key_not_found.unwrap_or(true),
            }
        }
        Some(F::ExtensionFilter(m)) => {
            let at = at.field("extension_filter");
            let Some(pb::extension_filter::ConfigType::TypedConfig(any)) = &m.config_type else {
                return Err(at
                    .field("typed_config")
                    .error("is required: the configuration of this filter with its @type"));
            };
            let at = at.field("typed_config");
            let found = extension(&at, any)?;
            match found.name.as_str() {
                "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter" => {
                    let m: ExpressionFilter = found.decode(&at)?;
                    let parsed = crate::plan::cel::parse(&m.expression);
                    let parsed = parsed.map_err(|why| at.field("expression").error(why))?;
                    AccessLogFilter::Expression(Arc::new(parsed))
                }
                _ => return Err(found.unknown(&at, "access log filter")),
            }
        }
        Some(F::LogTypeFilter(m)) => {
            let at = at.field("log_type_filter");
            let types = at.each("types", &m.types, |at, number| {
                data::AccessLogType::try_from(*number)
                    .map_err(|_| at.error(format!("{number} is no access log type")))
            });
            AccessLogFilter::LogType {
                types: types.iter().map(|known| known.as_str_name()).collect(),
                exclude: m.exclude,
            }
        }
        None => return Err(at.error("needs a condition such as status_code_filter")),
    })
}

fn comparison(at: At<'_>, m: &pb::ComparisonFilter) -> Step<Comparison> {
    use pb::comparison_filter::Op;
    let op = match enumeration(&at, "op", m.op)? {
        Op::Eq => ComparisonOp::Eq,
        Op::Ge => ComparisonOp::Ge,
        Op::Le => ComparisonOp::Le,
        Op::Ne => ComparisonOp::Ne,
    };
    // The runtime key is accepted without effect.
    let value = at.required("value", &m.value, |_, m| Ok(m.default_value))?;
    Ok(Comparison { op, value })
}

/// Envoy's short response flags.
const RESPONSE_FLAGS: [&str; 30] = [
    "LH", "UH", "UT", "LR", "UR", "UF", "UC", "UO", "NR", "DI", "FI", "RL", "UAEX", "RLSE", "DC",
    "URX", "SI", "IH", "DPE", "UMSDR", "RFCF", "NFCF", "DT", "UPE", "NC", "OM", "DF", "DO", "DR",
    "UDO",
];
