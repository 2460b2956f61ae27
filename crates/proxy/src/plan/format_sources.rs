//! `%FILE_CONTENT(…)%` and `%SECRET(…)%`: operators that must be allowed by a formatter, and whose values come from
//! outside. The main thread reads them and follows their changes, as it does for TLS.

use std::{collections::BTreeMap, path::PathBuf};

use super::{
    Listener,
    access_log::{AccessLog, JsonNode, LogFormat, LogOutput},
    format::{OperatorKind, Part, Template},
    network::NetworkFilterConfig,
    tls::SdsSecret,
};

/// Which operators the `formatters` of a format allow beside those that are built in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Formatters {
    /// `envoy.formatter.file_content`.
    pub file_content: bool,
    /// `envoy.formatter.generic_secret`: by the name that formats call them.
    pub secrets: BTreeMap<String, SdsSecret>,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextSource {
    /// The content of a file; it is looked at once a second.
    File(PathBuf),
    /// A generic secret.
    Secret(SdsSecret),
}

impl Formatters {
    /// The operator of this name, where it is one of theirs.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn operator(
        &self,
        name: &str,
        argument: Option<&str>,
    ) -> Option<Result<OperatorKind, String>> {
        let source = match name {
            "FILE_CONTENT" => self.file(argument.unwrap_or_default()),
            "SECRET" => self.secret(argument.unwrap_or_default()),
            _ => return None,
        };
        Some(source.map(|source| OperatorKind::Source(Box::new(source))))
    }

    fn file(&self, argument: &str) -> Result<TextSource, String> {
        if !self.file_content {
            return Err("needs the formatter envoy.formatter.file_content, where it stands".into());
        }
        // The directory whose changes Envoy would wait for: the file itself is looked at, links followed.
        let mut parts = argument.split(':').filter(|part| !part.is_empty());
        match (parts.next(), parts.next(), parts.next()) {
            (Some(path), _, None) => Ok(TextSource::File(path.into())),
            _ => Err("needs PATH or PATH:DIRECTORY".into()),
        }
    }

    fn secret(&self, name: &str) -> Result<TextSource, String> {
        match self.secrets.get(name) {
            Some(secret) => Ok(TextSource::Secret(secret.clone())),
            None => Err(format!(
                "`{name}` is none of the secret_configs of a formatter envoy.formatter.generic_secret"
            )),
        }
    }
}

/// What the formats of a listener's logs and replies need.
pub fn of_listener(plan: &Listener) -> Vec<&TextSource> {
    let mut found = Vec::new();
    plan.access_logs
        .iter()
        .for_each(|log| of_log(log, &mut found));
    let chains = plan.filter_chains.iter().chain(&plan.default_filter_chain);
    for filter in chains.flat_map(|chain| &chain.filters) {
        match &filter.config {
            NetworkFilterConfig::HttpConnectionManager(plan) => {
                plan.access_logs
                    .iter()
                    .for_each(|log| of_log(log, &mut found));
                let replies = plan.local_reply.mappers.iter();
                let replies = replies.filter_map(|mapper| mapper.body_format.as_ref());
                for format in replies.chain(&plan.local_reply.body_format) {
                    of_format(&format.format, &mut found);
                }
            }
            NetworkFilterConfig::TcpProxy(plan) => {
                plan.access_logs
                    .iter()
                    .for_each(|log| of_log(log, &mut found));
            }
            _ => {}
        }
    }
    found
}

/// What the formats of a log need.
pub(super) fn of_log<'p>(log: &'p AccessLog, found: &mut Vec<&'p TextSource>) {
    match &log.output {
        LogOutput::Lines { format, .. } => of_format(format, found),
        LogOutput::Grpc(_) => {}
        LogOutput::OpenTelemetry(log) => {
            log.body.iter().for_each(|node| of_node(node, found));
            let attributes = log.attributes.iter();
            attributes.for_each(|(_, node)| of_node(node, found));
        }
    }
}

/// What a format needs.
pub(super) fn of_format<'p>(format: &'p LogFormat, found: &mut Vec<&'p TextSource>) {
    match format {
        LogFormat::Text { template, .. } => of_template(template, found),
        LogFormat::Json { root, .. } => of_node(root, found),
    }
}

fn of_node<'p>(node: &'p JsonNode, found: &mut Vec<&'p TextSource>) {
    match node {
        JsonNode::Object(members) => members.iter().for_each(|(_, node)| of_node(node, found)),
        JsonNode::List(list) => list.iter().for_each(|node| of_node(node, found)),
        JsonNode::Template(template) => of_template(template, found),
        JsonNode::Literal(_) => {}
    }
}

fn of_template<'p>(template: &'p Template, found: &mut Vec<&'p TextSource>) {
    for part in &template.parts {
        if let Part::Operator(operator) = part
            && let OperatorKind::Source(source) = &operator.kind
        {
            found.push(source);
        }
    }
}
