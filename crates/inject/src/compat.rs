//! The argument lists of older releases, as older documents show them.

use std::time::Duration;

use serde_json::Value;

use crate::{
    Settings,
    template::{INIT, PROXY},
};

/// A release whose lists can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Release {
    /// Istio 1.5: settings of the proxy stand on its command line, and init containers have a command.
    #[value(name = "1.5")]
    V1_5,
}

/// Rewrites the containers that injection added to a pod (an object with `metadata` and `spec`). Today's agent takes
/// both forms.
pub fn apply(release: Release, pod: &mut Value, workload: &str, settings: &Settings) {
    let Release::V1_5 = release;
    let label = pod["metadata"]["labels"]["app"]
        .as_str()
        .filter(|t| !t.is_empty());
    let cluster = format!("{}.$(POD_NAMESPACE)", label.unwrap_or(workload));
    for list in ["initContainers", "containers"] {
        let containers = pod["spec"].get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            if container["name"] == INIT {
                init(container);
            } else if container["name"] == PROXY {
                container["args"] = args(container, &cluster, settings).into();
            }
        }
    }
}

/// 1.5 had neither port 15021 nor log flags, and named the program as the container's command.
fn init(container: &mut Value) {
    let Value::Object(fields) = container else {
        return;
    };
    let Some(Value::Array(args)) = fields.remove("args") else {
        return;
    };
    let mut command = Vec::new();
    let mut ports = false;
    for arg in args {
        let text = arg.as_str().unwrap_or_default();
        if text.starts_with("--log_") || text == "--force-apply" {
            continue;
        }
        let arg = match text.strip_prefix("15090,15021") {
            Some(rest) if ports => Value::from(format!("15090{rest}")),
            _ => arg.clone(),
        };
        ports = text == "-d";
        command.push(arg);
    }
    fields.insert("command".into(), command.into());
}

fn args(container: &Value, cluster: &str, settings: &Settings) -> Vec<Value> {
    let today: Vec<&str> = container["args"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let levels = today.iter().filter(|a| a.starts_with("--proxy"));
    let proxy = settings.mesh.default_config.clone().unwrap_or_default();
    let duration = |d: Option<proto::Duration>, default: u64| match d {
        Some(d) => go(Duration::new(
            d.seconds.max(0) as u64,
            d.nanos.max(0) as u32,
        )),
        None => go(Duration::from_secs(default)),
    };
    let value = |path: &str, default: &str| match settings.values.text(path) {
        text if text.is_empty() => default.to_string(),
        text => text,
    };
    let concurrency = proxy.concurrency.unwrap_or(2).to_string();
    let mut out: Vec<String> = today.iter().take(4).map(|a| a.to_string()).collect();
    let mut flag = |name: &str, value: String| out.extend([name.to_string(), value]);
    flag(
        "--configPath",
        proxy.config_path.trim_start_matches('.').into(),
    );
    flag("--binaryPath", proxy.binary_path.clone());
    flag("--serviceCluster", cluster.into());
    flag("--drainDuration", duration(proxy.drain_duration, 45));
    flag(
        "--parentShutdownDuration",
        value("global.proxy.parentShutdownDuration", "1m0s"),
    );
    flag("--discoveryAddress", proxy.discovery_address.clone());
    flag(
        "--zipkinAddress",
        value("global.tracer.zipkin.address", "zipkin.istio-system:9411"),
    );
    out.extend(levels.map(|a| a.to_string()));
    let mut flag = |name: &str, value: String| out.extend([name.to_string(), value]);
    flag(
        "--connectTimeout",
        duration(settings.mesh.connect_timeout, 10),
    );
    flag("--proxyAdminPort", proxy.proxy_admin_port.to_string());
    flag("--concurrency", concurrency);
    // 1.5 protects this connection by SDS; the policy of that name was for its forerunner.
    flag("--controlPlaneAuthPolicy", "NONE".into());
    flag(
        "--dnsRefreshRate",
        value("global.proxy.dnsRefreshRate", "300s"),
    );
    flag("--statusPort", value("global.proxy.statusPort", "15020"));
    out.push(format!("--trust-domain={}", settings.mesh.trust_domain));
    out.push("--controlPlaneBootstrap=false".into());
    out.into_iter().map(Value::from).collect()
}

/// A duration as Go prints it: `45s`, `1m0s`, `1.5s`.
fn go(duration: Duration) -> String {
    let all = duration.as_secs();
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    let mut fraction = format!("{:09}", duration.subsec_nanos());
    fraction.truncate(fraction.trim_end_matches('0').len());
    let seconds = match fraction.as_str() {
        "" => format!("{seconds}s"),
        fraction => format!("{seconds}.{fraction}s"),
    };
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, minutes) => format!("{minutes}m{seconds}"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload;
    use serde_json::json;

    /// The lists that Istio 1.5 wrote for bookinfo's productpage.
    #[test]
    fn the_lists_of_1_5() {
        let deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "productpage-v1"},
            "spec": {"template": {
                "metadata": {"labels": {"app": "productpage", "version": "v1"}},
                "spec": {"containers": [{"name": "productpage", "ports": [{"containerPort": 9080}]}]},
            }},
        });
        let settings = Settings::default();
        let mut object = workload::object(&deployment, &settings, &mut Vec::new())
            .unwrap()
            .unwrap();
        let pod = &mut object["spec"]["template"];
        apply(Release::V1_5, pod, "productpage-v1", &settings);
        let init = &pod["spec"]["initContainers"][0];
        assert_eq!(
            init["command"],
            json!([
                "istio-iptables",
                "-p",
                "15001",
                "-z",
                "15006",
                "-u",
                "1337",
                "-m",
                "REDIRECT",
                "-i",
                "*",
                "-x",
                "",
                "-b",
                "*",
                "-d",
                "15090,15020"
            ])
        );
        assert_eq!(init.get("args"), None);
        assert_eq!(
            pod["spec"]["containers"][1]["args"],
            json!([
                "proxy",
                "sidecar",
                "--domain",
                "$(POD_NAMESPACE).svc.cluster.local",
                "--configPath",
                "/etc/istio/proxy",
                "--binaryPath",
                "/usr/local/bin/envoy",
                "--serviceCluster",
                "productpage.$(POD_NAMESPACE)",
                "--drainDuration",
                "45s",
                "--parentShutdownDuration",
                "1m0s",
                "--discoveryAddress",
                "istiod.istio-system.svc:15012",
                "--zipkinAddress",
                "zipkin.istio-system:9411",
                "--proxyLogLevel=warning",
                "--proxyComponentLogLevel=misc:error",
                "--connectTimeout",
                "10s",
                "--proxyAdminPort",
                "15000",
                "--concurrency",
                "2",
                "--controlPlaneAuthPolicy",
                "NONE",
                "--dnsRefreshRate",
                "300s",
                "--statusPort",
                "15020",
                "--trust-domain=cluster.local",
                "--controlPlaneBootstrap=false"
            ])
        );
    }
}
