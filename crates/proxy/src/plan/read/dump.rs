//! A config dump as a configuration that calls can be explained with.

use prost::{Message, Name};
use proto::{
    Any,
    envoy::{
        admin::v3::{ListenersConfigDump, RoutesConfigDump},
        config::{
            listener::v3::Listener as ListenerMessage,
            route::v3::RouteConfiguration as RouteMessage,
        },
    },
};
use serde_json::Value;

use super::{listener::listener, route::route_configuration};
use crate::plan::{
    PlanError, PlanErrors, RouteConfiguration,
    call::Configuration,
    error::{At, Step, collect_lenient},
};

impl Configuration {
    /// Reads `/config_dump` (`{"configs": […]}`). What this version does not implement is left out and listed.
    ///
    /// # Errors
    /// What is wrong with the dump.
    pub fn from_dump(dump: &Value) -> Result<Self, String> {
        let configs = dump
            .get("configs")
            .and_then(Value::as_array)
            .ok_or("this is no config dump: it has no list `configs`")?;
        let mut out = Self::default();
        for config in configs {
            match config["@type"].as_str().map(proto::any::type_name) {
                Some("envoy.admin.v3.ListenersConfigDump") => out.add_listeners(&read(config)?)?,
                Some("envoy.admin.v3.RoutesConfigDump") => out.add_routes(&read(config)?)?,
                _ => {}
            }
        }
        Ok(out)
    }

    fn add_listeners(&mut self, dump: &ListenersConfigDump) -> Result<(), String> {
        let fixed = dump
            .static_listeners
            .iter()
            .filter_map(|l| l.listener.as_ref());
        let dynamic = dump.dynamic_listeners.iter();
        let dynamic = dynamic.filter_map(|l| l.active_state.as_ref()?.listener.as_ref());
        for any in fixed.chain(dynamic) {
            let message: ListenerMessage = decode(any)?;
            let planned = collect_lenient(|at| listener(at, &message));
            if let Some(plan) = self.take("listener", &message.name, planned) {
                self.listeners.push(plan);
            }
        }
        Ok(())
    }

    fn add_routes(&mut self, dump: &RoutesConfigDump) -> Result<(), String> {
        let fixed = dump
            .static_route_configs
            .iter()
            .filter_map(|r| r.route_config.as_ref());
        let dynamic = dump
            .dynamic_route_configs
            .iter()
            .filter_map(|r| r.route_config.as_ref());
        for any in fixed.chain(dynamic) {
            let message: RouteMessage = decode(any)?;
            let planned = collect_lenient(|at: At<'_>| -> Step<RouteConfiguration> {
                route_configuration(at, &message)
            });
            if let Some(plan) = self.take("route configuration", &message.name, planned) {
                self.routes.insert(message.name, plan);
            }
        }
        Ok(())
    }

    fn take<T>(
        &mut self,
        kind: &str,
        name: &str,
        planned: Result<(T, Vec<PlanError>), PlanErrors>,
    ) -> Option<T> {
        let (plan, errors) = match planned {
            Ok((plan, left_out)) => (Some(plan), left_out),
            Err(errors) => (None, errors.0),
        };
        self.left_out
            .extend(errors.iter().map(|e| format!("{kind} {name}: {e}")));
        plan
    }
}

fn read<M: Message + Name + Default>(config: &Value) -> Result<M, String> {
    let mut config = config.clone();
    if let Value::Object(members) = &mut config {
        members.remove("@type");
    }
    proto::json::from_value(&config).map_err(|e| format!("{}: {e}", M::full_name()))
}

fn decode<M: Message + Name + Default>(any: &Any) -> Result<M, String> {
    proto::any::unpack(any).map_err(|e| e.to_string())
}
