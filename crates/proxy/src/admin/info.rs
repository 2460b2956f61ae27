//! What the process says about itself: readiness, version, stats, memory, runtime.

use prost::{Message, Name};
use proto::envoy::{
    admin::v3::{
        CommandLineOptions, Memory, ServerInfo,
        command_line_options::{DrainStrategy, Mode},
        server_info,
    },
    config::bootstrap::v3::Bootstrap as BootstrapMessage,
};
use serde_json::{Map, Value, json};
use stats::{HistogramView, Kind, Query};

use super::{Admin, Answer, Params};
use crate::{
    command::version,
    server::{State, figures},
    worker::drain,
};

/// `/ready`.
pub(super) fn ready(admin: &Admin) -> Answer {
    let state = state(admin);
    let status = if state == server_info::State::Live {
        200
    } else {
        503
    };
    Answer::text(format!("{}\n", state.as_str_name())).status(status)
}

fn state(admin: &Admin) -> server_info::State {
    use std::sync::atomic::Ordering::Relaxed;
    match admin.server.state() {
        State::Live if admin.server.shared.health_failed.load(Relaxed) => {
            server_info::State::Draining
        }
        State::Live => server_info::State::Live,
        State::Draining => server_info::State::Draining,
        State::PreInitializing => server_info::State::PreInitializing,
        State::Initializing => server_info::State::Initializing,
    }
}

/// `/server_info`.
pub(super) fn server_info(admin: &Admin) -> Answer {
    let server = &admin.server;
    let options = &server.options;
    let uptime = proto::Duration {
        seconds: server.started.elapsed().as_secs() as i64,
        nanos: 0,
    };
    let duration = |d: std::time::Duration| proto::Duration {
        seconds: d.as_secs() as i64,
        nanos: d.subsec_nanos() as i32,
    };
    let argument = |names: &[&str]| argument(&options.command_line, names);
    let strategy = match options.drain_strategy {
        drain::DrainStrategy::Gradual => DrainStrategy::Gradual,
        drain::DrainStrategy::Immediate => DrainStrategy::Immediate,
    };
    let message = BootstrapMessage::decode(&*server.bootstrap.encoded).unwrap_or_default();
    let info = ServerInfo {
        version: version(),
        state: state(admin) as i32,
        uptime_current_epoch: Some(uptime),
        uptime_all_epochs: Some(uptime),
        hot_restart_version: "disabled".to_owned(),
        hot_restart_initializing: false,
        command_line_options: Some(CommandLineOptions {
            concurrency: options.concurrency as u32,
            config_path: argument(&["-c", "--config-path"]),
            config_yaml: argument(&["--config-yaml"]),
            log_level: argument(&["-l", "--log-level"]),
            component_log_level: argument(&["--component-log-level"]),
            service_cluster: server.bootstrap.node.cluster.to_string(),
            service_node: server.bootstrap.node.id.to_string(),
            service_zone: server.bootstrap.node.locality.zone.clone(),
            file_flush_interval: Some(duration(options.file_flush_interval)),
            drain_time: Some(duration(options.drain_time)),
            drain_strategy: strategy as i32,
            parent_shutdown_time: Some(duration(options.parent_shutdown_time)),
            mode: Mode::Serve as i32,
            disable_hot_restart: true,
            restart_epoch: options.restart_epoch,
            ..CommandLineOptions::default()
        }),
        node: message.node,
    };
    let mut value = proto::json::to_value(&info);
    // LIVE is 0, which canonical JSON leaves out, and the one field that everybody reads.
    value["state"] = state(admin).as_str_name().into();
    let name = <ServerInfo as Name>::full_name();
    Answer::json(&proto::json::with_proto_names(&name, value))
}

/// The value of an argument as it was given: `-c FILE`, `-cFILE`, `--config-path FILE` or `--config-path=FILE`.
fn argument(line: &[String], names: &[&str]) -> String {
    let mut found = String::new();
    for (index, word) in line.iter().enumerate() {
        for name in names {
            let rest = word.strip_prefix(name);
            match rest {
                Some("") => found = line.get(index + 1).cloned().unwrap_or_default(),
                Some(rest) if name.starts_with("--") => {
                    if let Some(value) = rest.strip_prefix('=') {
                        found = value.to_owned();
                    }
                }
                Some(rest) if !word.starts_with("--") => {
                    found = rest.trim_start_matches('=').to_owned()
                }
                _ => {}
            }
        }
    }
    found
}

/// `/stats` and `/stats/prometheus`.
pub(super) fn stats(admin: &Admin, params: &Params, format: Option<&str>) -> Answer {
    let filter = match params.get("filter").filter(|f| !f.is_empty()) {
        None => None,
        Some(text) => match regex::Regex::new(text) {
            Ok(regex) => Some(regex),
            Err(_) => return Answer::text("Invalid re2 regex").status(400),
        },
    };
    let server = &admin.server;
    server.publish();
    let kind = match params.get("type") {
        None | Some("" | "All") => None,
        Some("Counters") => Some(Kind::Counter),
        Some("Gauges") => Some(Kind::Gauge),
        Some("Histograms") => Some(Kind::Histogram),
        Some("TextReadouts") => Some(Kind::Text),
        Some(_) => {
            let usage = "usage: /stats?type=(TextReadouts|Counters|Gauges|Histograms|All)\n";
            return Answer::text(usage).status(400);
        }
    };
    let histograms = match params.get("histogram_buckets") {
        None | Some("" | "summary") => HistogramView::Summary,
        Some("cumulative") => HistogramView::Cumulative,
        Some("disjoint") => HistogramView::Disjoint,
        Some(_) => {
            let usage = "usage: /stats?histogram_buckets=(summary|cumulative|disjoint)\n";
            return Answer::text(usage).status(400);
        }
    };
    let query = Query {
        filter,
        used_only: params.has("usedonly"),
        kind,
        histograms,
    };
    match format.or(params.get("format")) {
        None | Some("" | "text") => Answer::text(server.store.text(&query)),
        Some("json") => Answer {
            content_type: "application/json",
            ..Answer::text(server.store.json(&query))
        },
        Some("prometheus") => Answer {
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            ..Answer::text(server.store.prometheus(&query))
        },
        Some(_) => Answer::text("usage: /stats?format=(json|prometheus|text)\n").status(400),
    }
}

/// `/memory`, from the kernel's figures.
pub(super) fn memory() -> Answer {
    let figures = figures::Memory::read();
    let memory = Memory {
        allocated: figures.allocated,
        heap_size: figures.heap,
        total_physical_bytes: figures.physical,
        ..Memory::default()
    };
    Answer::message(&memory)
}

/// `/runtime`: the static layers, merged.
pub(super) fn runtime(admin: &Admin) -> Answer {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let entries: Map<String, Value> = admin
        .server
        .bootstrap
        .runtime
        .iter()
        .map(|(key, value)| {
            let value = text(value);
            (
                key.clone(),
                json!({ "final_value": value, "layer_values": [value] }),
            )
        })
        .collect();
    Answer::json(&json!({ "layers": ["static"], "entries": entries }))
}

/// `/init_dump`: what is still waiting, by kind.
pub(super) fn init_dump(admin: &Admin) -> Answer {
    let truth = admin.truth.borrow();
    let clusters: Vec<&str> = truth
        .clusters
        .entries
        .iter()
        .filter(|(_, e)| e.warming.is_some())
        .map(|(n, _)| &**n)
        .collect();
    let listeners: Vec<&str> = truth
        .listeners
        .entries
        .iter()
        .filter(|(_, e)| e.warming.is_some())
        .map(|(n, _)| &**n)
        .collect();
    let mut dumps = Vec::new();
    for (name, targets) in [("clusters", clusters), ("listeners", listeners)] {
        if !targets.is_empty() {
            dumps.push(json!({ "name": name, "target_names": targets }));
        }
    }
    Answer::json(&json!({ "unready_targets_dumps": dumps }))
}
