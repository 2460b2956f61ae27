//! The overload manager.

use std::{sync::Arc, time::Duration};

use proto::envoy::{
    config::overload::v3 as pb,
    extensions::resource_monitors::{
        cgroup_memory::v3::CgroupMemoryConfig,
        downstream_connections::v3::DownstreamConnectionsConfig, fixed_heap::v3::FixedHeapConfig,
        injected_resource::v3::InjectedResourceConfig,
    },
};

use super::common::{above_zero, extension};
use crate::plan::{
    error::{At, Step, unsupported},
    matcher::Finite,
    overload::{Action, Monitor, MonitorKind, OverloadManager, ShedPoint, Trigger, TriggerKind},
};

/// What the overload manager says: the manager itself, and the limit of downstream connections.
#[derive(Default)]
pub(super) struct Overload {
    pub(super) manager: Option<OverloadManager>,
    pub(super) max_downstream_connections: Option<u64>,
}

/// `OverloadManager`.
pub(super) fn overload_manager(at: At<'_>, m: &pb::OverloadManager) -> Step<Overload> {
    let pb::OverloadManager {
        refresh_interval,
        resource_monitors,
        actions,
        loadshed_points,
        buffer_factory_config,
    } = m;
    unsupported!(at, buffer_factory_config);
    let mut limit = None;
    let monitors = at.each("resource_monitors", resource_monitors, |at, m| {
        Ok(match monitor(at, m)? {
            Measured::Connections(max) => {
                limit = Some(max);
                None
            }
            Measured::Kind(kind) => Some(Monitor {
                name: m.name.as_str().into(),
                kind,
            }),
        })
    });
    let monitors: Vec<Monitor> = monitors.into_iter().flatten().collect();
    let actions: Vec<_> = at.each("actions", actions, |at, m| {
        let pb::OverloadAction {
            name,
            triggers,
            typed_config,
        } = m;
        unsupported!(at, typed_config);
        let found = Action::ALL.iter().find(|action| action.name() == name);
        let Some(action) = found else {
            return Err(at
                .field("name")
                .not_implemented(format!("there is no overload action `{name}`")));
        };
        Ok((*action, triggers_of(&at, triggers, &monitors)))
    });
    let points: Vec<_> = at.each("loadshed_points", loadshed_points, |at, m| {
        let pb::LoadShedPoint { name, triggers } = m;
        let found = ShedPoint::ALL.iter().find(|point| point.name() == name);
        let Some(point) = found else {
            return Err(at
                .field("name")
                .not_implemented(format!("there is no load shed point `{name}`")));
        };
        Ok((*point, triggers_of(&at, triggers, &monitors)))
    });
    unique(
        &at,
        "actions",
        actions.iter().map(|(action, _)| action.name()),
    );
    unique(
        &at,
        "loadshed_points",
        points.iter().map(|(point, _)| point.name()),
    );
    let refresh_interval = above_zero(&at, "refresh_interval", refresh_interval)?;
    let manager = (!monitors.is_empty()).then(|| OverloadManager {
        refresh_interval: refresh_interval.unwrap_or(Duration::from_secs(1)),
        monitors,
        actions,
        points,
    });
    Ok(Overload {
        manager,
        max_downstream_connections: limit,
    })
}

enum Measured {
    Kind(MonitorKind),
    Connections(u64),
}

fn monitor(at: At<'_>, m: &pb::ResourceMonitor) -> Step<Measured> {
    let pb::ResourceMonitor { name, config_type } = m;
    at.text("name", name)?;
    let Some(pb::resource_monitor::ConfigType::TypedConfig(any)) = config_type else {
        return Err(at.field("typed_config").error("is required"));
    };
    let at = at.field("typed_config");
    let found = extension(&at, any)?;
    let kind = match found.name.as_str() {
        "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig" =>
        {
            let m: DownstreamConnectionsConfig = found.decode(&at)?;
            return match u64::try_from(m.max_active_downstream_connections) {
                Ok(limit) if limit > 0 => Ok(Measured::Connections(limit)),
                _ => Err(at
                    .field("max_active_downstream_connections")
                    .error("must be greater than 0")),
            };
        }
        "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig" => {
            let m: FixedHeapConfig = found.decode(&at)?;
            let most = match m.max_heap_size_bytes_runtime {
                Some(runtime) => runtime.default_value,
                None => m.max_heap_size_bytes,
            };
            if most == 0 {
                return Err(at
                    .field("max_heap_size_bytes")
                    .error("must be greater than 0"));
            }
            MonitorKind::FixedHeap(most)
        }
        "envoy.extensions.resource_monitors.cgroup_memory.v3.CgroupMemoryConfig" => {
            let m: CgroupMemoryConfig = found.decode(&at)?;
            MonitorKind::CgroupMemory(Some(m.max_memory_bytes).filter(|max| *max > 0))
        }
        "envoy.extensions.resource_monitors.injected_resource.v3.InjectedResourceConfig" => {
            let m: InjectedResourceConfig = found.decode(&at)?;
            let path: Arc<str> = at.text("filename", &m.filename)?;
            MonitorKind::Injected(path.as_ref().into())
        }
        _ => return Err(found.unknown(&at, "resource monitor")),
    };
    Ok(Measured::Kind(kind))
}

fn triggers_of(at: &At<'_>, triggers: &[pb::Trigger], monitors: &[Monitor]) -> Vec<Trigger> {
    use pb::trigger::TriggerOneof as T;
    if triggers.is_empty() {
        at.field("triggers").error("needs at least one trigger");
    }
    at.each("triggers", triggers, |at, m| {
        let share = |at: At<'_>, value: f64| {
            Finite::new(value)
                .filter(|value| (0.0..=1.0).contains(&value.get()))
                .ok_or_else(|| at.error("must be from 0 to 1"))
        };
        let found = monitors.iter().position(|monitor| *monitor.name == *m.name);
        let monitor = found.ok_or_else(|| {
            let name = &m.name;
            at.field("name").error(format!(
                "`{name}` is none of the resource_monitors that can be waited for"
            ))
        })?;
        let kind = match &m.trigger_oneof {
            Some(T::Threshold(m)) => {
                let at = at.field("threshold");
                TriggerKind::Threshold(share(at.field("value"), m.value)?)
            }
            Some(T::Scaled(m)) => {
                let at = at.field("scaled");
                let from = share(at.field("scaling_threshold"), m.scaling_threshold)?;
                let to = share(at.field("saturation_threshold"), m.saturation_threshold)?;
                if from.get() >= to.get() {
                    return Err(at.error("scaling_threshold must be below saturation_threshold"));
                }
                TriggerKind::Scaled(from, to)
            }
            None => return Err(at.error("needs one of threshold, scaled")),
        };
        Ok(Trigger { monitor, kind })
    })
}

fn unique<'a>(at: &At<'_>, field: &str, names: impl Iterator<Item = &'a str>) {
    let mut seen = std::collections::HashSet::new();
    for (index, name) in names.enumerate() {
        if !seen.insert(name) {
            at.field(field)
                .index(index)
                .field("name")
                .error(format!("`{name}` is there already"));
        }
    }
}
