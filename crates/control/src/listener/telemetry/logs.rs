//! Access logs: which providers log which side of a call, and under which condition.

use std::collections::{BTreeMap, BTreeSet};

use proto::{
    envoy::config::accesslog::v3::AccessLog,
    istio::{
        mesh::v1alpha1::mesh_config::{ExtensionProvider, extension_provider::Provider},
        telemetry::v1alpha1::{AccessLogging, WorkloadMode},
    },
};

use super::{
    super::{
        access_log::{
            self, AccessLogs, file_of_mesh, file_of_provider, http_grpc_of_provider,
            tcp_grpc_of_provider,
        },
        settings::Class,
    },
    Applied, Kind, covers, mode_of, provider_names,
};

/// The provider whose format is the mesh's, unless it has one of its own.
const BUILTIN: &str = "envoy";

/// What one provider logs.
#[derive(Debug, Clone, Default, PartialEq)]
struct Logging {
    disabled: bool,
    /// A CEL expression.
    condition: Option<String>,
}

impl Applied<'_> {
    /// The logs of a side: those that Telemetry asks for, or MeshConfig's own.
    pub(super) fn logs(&self, class: Class) -> AccessLogs {
        let mesh = self.mesh.config();
        let mut out = AccessLogs::default();
        let mut any = false;
        for (name, logging) in self.logging(class) {
            let Some(provider) = self.provider(&name) else {
                continue;
            };
            let Some(log) = self.log_of(provider) else {
                continue;
            };
            // Even a provider that is switched off stands instead of what MeshConfig says.
            any = true;
            if !logging.disabled {
                out.push_everywhere(log, logging.condition.as_deref(), mesh);
            }
        }
        if any {
            out
        } else {
            AccessLogs::from_mesh(mesh)
        }
    }

    /// By provider, in order of names.
    fn logging(&self, class: Class) -> BTreeMap<String, Logging> {
        let defaults = self.default_providers(Kind::AccessLogging);
        let levels: Vec<&[AccessLogging]> = self
            .objects
            .iter()
            .map(|o| o.spec.access_logging.as_slice())
            .filter(|l| !l.is_empty())
            .collect();
        let mut out = BTreeMap::new();
        if levels.is_empty() {
            out.extend(
                defaults
                    .iter()
                    .map(|name| ((*name).to_owned(), Logging::default())),
            );
            return out;
        }
        let mode = mode_of(class);
        let applies = |rule: &AccessLogging| {
            let wanted = rule
                .r#match
                .as_ref()
                .map_or(WorkloadMode::ClientAndServer, |m| m.mode());
            covers(wanted, mode)
        };
        // The innermost level that names providers says which ones count at all.
        let mut counting: BTreeSet<&str> = defaults.iter().copied().collect();
        let mut conditions: BTreeMap<&str, Option<String>> = BTreeMap::new();
        for level in &levels {
            let mut named = BTreeSet::new();
            for rule in level.iter().filter(|r| applies(r)) {
                for name in provider_names(&rule.providers) {
                    named.insert(name);
                    conditions.insert(name, rule.filter.as_ref().map(|f| f.expression.clone()));
                }
            }
            if !named.is_empty() {
                counting = named;
            }
        }
        // A rule without providers is about those of the rule before it.
        let mut meant = defaults;
        for rule in levels.into_iter().flatten() {
            if !rule.providers.is_empty() {
                meant = provider_names(&rule.providers);
            }
            for name in meant
                .iter()
                .filter(|n| counting.contains(*n) && applies(rule))
            {
                let logging = if rule.disabled == Some(true) {
                    Logging {
                        disabled: true,
                        condition: None,
                    }
                } else {
                    let condition = conditions.get(name).cloned().flatten();
                    Logging {
                        disabled: false,
                        condition,
                    }
                };
                out.insert((*name).to_owned(), logging);
            }
        }
        out
    }

    fn log_of(&self, provider: &ExtensionProvider) -> Option<AccessLog> {
        let destination =
            |service: &str, port: u32| self.destination(&provider.name, service, port);
        match provider.provider.as_ref()? {
            Provider::EnvoyFileAccessLog(file) => {
                let plain = file.log_format.is_none() && !file.omit_empty_values;
                Some(if provider.name == BUILTIN && plain {
                    file_of_mesh(&file.path, self.mesh.config())
                } else {
                    file_of_provider(file)
                })
            }
            Provider::EnvoyHttpAls(als) => {
                let to = destination(&als.service, als.port)?;
                Some(http_grpc_of_provider(als, &to.cluster, &to.host))
            }
            Provider::EnvoyTcpAls(als) => {
                let to = destination(&als.service, als.port)?;
                Some(tcp_grpc_of_provider(als, &to.cluster, &to.host))
            }
            Provider::EnvoyOtelAls(als) => {
                let to = destination(&als.service, als.port)?;
                Some(access_log::open_telemetry(als, &to.cluster, &to.host))
            }
            // The others do not log.
            _ => None,
        }
    }
}
