//! Telemetry.

use proto::istio::telemetry::v1alpha1::{
    ProviderRef, Telemetry, metric_selector::MetricMatch,
    metrics_overrides::tag_override::Operation, tracing::custom_tag::Type,
};

use super::Report;

pub(super) fn check(report: &mut Report, spec: &Telemetry) {
    report.targets(
        spec.selector.as_ref(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
    );
    if spec.tracing.len() > 1 {
        report.warning("spec.tracing", "only the first entry has an effect");
    }
    for (i, tracing) in spec.tracing.iter().enumerate() {
        let field = format!("spec.tracing[{i}]");
        providers(report, &field, &tracing.providers);
        if tracing
            .random_sampling_percentage
            .is_some_and(|p| !(0.0..=100.0).contains(&p))
        {
            report.error(
                format!("{field}.randomSamplingPercentage"),
                "must be 0 to 100",
            );
        }
        for (name, tag) in &tracing.custom_tags {
            let field = format!("{field}.customTags[{name:?}]");
            let empty = match &tag.r#type {
                Some(Type::Literal(l)) if l.value.is_empty() => Some("literal.value"),
                Some(Type::Header(h)) if h.name.is_empty() => Some("header.name"),
                Some(Type::Environment(e)) if e.name.is_empty() => Some("environment.name"),
                _ => None,
            };
            if let Some(part) = empty {
                report.error(format!("{field}.{part}"), "is missing");
            }
            if name.is_empty() {
                report.error(field, "a tag needs a name");
            }
        }
    }
    for (i, metrics) in spec.metrics.iter().enumerate() {
        let field = format!("spec.metrics[{i}]");
        providers(report, &field, &metrics.providers);
        for (j, o) in metrics.overrides.iter().enumerate() {
            let field = format!("{field}.overrides[{j}]");
            for (name, tag) in &o.tag_overrides {
                let field = format!("{field}.tagOverrides[{name:?}].value");
                match tag.operation() {
                    Operation::Upsert if tag.value.is_empty() => {
                        report.error(field, "is needed for operation UPSERT")
                    }
                    Operation::Remove if !tag.value.is_empty() => {
                        report.error(field, "must be left out for operation REMOVE")
                    }
                    _ => {}
                }
            }
            if let Some(MetricMatch::CustomMetric(name)) =
                o.r#match.as_ref().and_then(|m| m.metric_match.as_ref())
                && name.is_empty()
            {
                report.error(format!("{field}.match.customMetric"), "is empty");
            }
        }
    }
    for (i, logging) in spec.access_logging.iter().enumerate() {
        let field = format!("spec.accessLogging[{i}]");
        providers(report, &field, &logging.providers);
        if let Some(filter) = &logging.filter {
            let why = super::cel::check(&filter.expression);
            report.check(
                format!("{field}.filter.expression"),
                why.map_err(|why| format!("is no CEL expression: {why}")),
            );
        }
    }
}

fn providers(report: &mut Report, field: &str, all: &[ProviderRef]) {
    for (i, _) in all.iter().enumerate().filter(|(_, p)| p.name.is_empty()) {
        report.error(format!("{field}.providers[{i}].name"), "is missing");
    }
}
