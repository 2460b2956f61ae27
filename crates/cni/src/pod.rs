//! Whether and how a pod is captured: what the real plug-in reads of it, with its defaults.

use std::collections::BTreeMap;

use base::cidr::Cidr;
use serde_json::Value;

use crate::CniError;

/// Why a pod is left alone, or the flags of istio-iptables for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is no business of ours, for that reason.
    Skip(String),
    /// Its rules, as flags.
    Capture(Vec<String>),
}

/// Judges the Pod object `pod`, whose name for messages is `id`.
pub(crate) fn judge(id: &str, pod: &Value) -> Result<Verdict, CniError> {
    let skip = |why: &str| Ok(Verdict::Skip(why.into()));
    let list = |key: &str| pod["spec"][key].as_array().cloned().unwrap_or_default();
    let containers = [list("containers"), list("initContainers")].concat();
    let named = |name: &str| containers.iter().find(|c| c["name"] == name);
    if named("istio-init").is_some() {
        return skip("it has an istio-init container");
    }
    let Some(proxy) = named("istio-proxy") else {
        return skip("it has no istio-proxy container");
    };
    let environment = environment(proxy);
    if environment.get("DISABLE_ENVOY").is_some_and(|v| truth(v)) {
        return skip("DISABLE_ENVOY is set on istio-proxy");
    }
    let args: Vec<&str> = proxy["args"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if let ["proxy", kind, ..] = args[..]
        && !kind.starts_with('-')
        && kind != "sidecar"
    {
        return skip("its proxy is no sidecar");
    }
    let text = |part: &str, key: &str| pod["metadata"][part][key].as_str();
    // The label is the newer form and wins.
    let inject = text("labels", INJECT).or(text("annotations", INJECT));
    if inject.is_some_and(|v| matches!(v, "false" | "False" | "FALSE" | "f" | "F" | "0")) {
        return skip("sidecar.istio.io/inject is false");
    }
    if text("annotations", "sidecar.istio.io/status").is_none() {
        return skip("it has no sidecar.istio.io/status annotation");
    }
    let read = |key: &'static str, default: &str, check: fn(&str) -> Result<(), String>| {
        let Some(value) = text("annotations", key) else {
            return Ok(default.to_owned());
        };
        match check(value) {
            Ok(()) => Ok(value.to_owned()),
            Err(why) => Err(CniError::Annotation {
                pod: id.into(),
                key,
                value: value.into(),
                why,
            }),
        }
    };
    let number = |field: &str| {
        let id = proxy["securityContext"][field].as_u64();
        id.filter(|n| *n != 0).unwrap_or(1337).to_string()
    };
    let excluded = read(EXCLUDE_IN, "15020", ports_or_all)?;
    let virtual_interfaces = match text("annotations", REROUTE) {
        Some(value) => value.to_owned(),
        None => read(KUBEVIRT, "", anything)?,
    };
    let mode = read(MODE, "REDIRECT", mode)?;
    let excluded_interfaces = read(EXCLUDE_INTERFACES, "", anything)?;
    let rerouted = if text("annotations", REROUTE).is_some() {
        REROUTE
    } else {
        KUBEVIRT
    };
    for (key, value) in [
        (EXCLUDE_INTERFACES, &excluded_interfaces),
        (rerouted, &virtual_interfaces),
    ] {
        // Programs see sockets, and no interface.
        if mode == "EBPF" && !value.is_empty() {
            return Err(CniError::Annotation {
                pod: id.into(),
                key,
                value: value.clone(),
                why: format!("it does not go with {MODE}: EBPF; leave one of them out"),
            });
        }
    }
    let mut flags = Vec::new();
    for (flag, value) in [
        ("-p", "15001".to_owned()),
        ("-z", "15006".to_owned()),
        ("-u", number("runAsUser")),
        ("-g", number("runAsGroup")),
        ("-m", mode),
        ("-i", read(INCLUDE_RANGES, "*", ranges_or_all)?),
        ("-x", read(EXCLUDE_RANGES, "", ranges)?),
        ("-b", read(INCLUDE_IN, "*", ports_or_all)?),
        ("-d", with_own_ports(&excluded)),
        ("-o", read(EXCLUDE_OUT, "15020", ports_or_all)?),
        ("-q", read(INCLUDE_OUT, "", ports_or_all)?),
        ("-k", virtual_interfaces),
        ("-c", excluded_interfaces),
    ] {
        flags.extend([flag.to_owned(), value]);
    }
    let on = |name: &str| environment.get(name).is_some_and(|v| truth(v));
    // A pod's resolvers are not known on the node: every query is captured.
    if on("ISTIO_META_DNS_CAPTURE") {
        flags.extend(["--redirect-dns".into(), "--capture-all-dns".into()]);
    }
    if on("INVALID_DROP") {
        flags.push("--drop-invalid".into());
    }
    if on("ISTIO_DUAL_STACK") {
        flags.push("--dual-stack".into());
    }
    Ok(Verdict::Capture(flags))
}

/// The proxy's environment, with what its ProxyConfig adds.
fn environment(proxy: &Value) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    for entry in proxy["env"].as_array().into_iter().flatten() {
        if let (Some(name), Some(value)) = (entry["name"].as_str(), entry["value"].as_str()) {
            out.insert(name.to_owned(), value.to_owned());
        }
    }
    let config = out.get("PROXY_CONFIG").cloned().unwrap_or_default();
    let config: Value = serde_saphyr::from_str(&config).unwrap_or_default();
    for (name, value) in config["proxyMetadata"].as_object().into_iter().flatten() {
        if let Some(value) = value.as_str() {
            out.entry(name.clone()).or_insert_with(|| value.to_owned());
        }
    }
    out
}

/// The proxy's own ports behind the user's, each once.
fn with_own_ports(given: &str) -> String {
    let mut out: Vec<&str> = Vec::new();
    for port in given.split(',').chain(["15020", "15021", "15090"]) {
        let port = port.trim();
        if !port.is_empty() && !out.contains(&port) {
            out.push(port);
        }
    }
    out.join(",")
}

/// As Go reads it.
fn truth(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "true" | "TRUE" | "True")
}

fn anything(_: &str) -> Result<(), String> {
    Ok(())
}

fn mode(text: &str) -> Result<(), String> {
    match text {
        "REDIRECT" | "TPROXY" | "EBPF" => Ok(()),
        _ => Err("REDIRECT, TPROXY or EBPF is expected".into()),
    }
}

fn ports_or_all(text: &str) -> Result<(), String> {
    if text == "*" || text.trim().is_empty() {
        return Ok(());
    }
    let bad = |p: &&str| p.trim().parse::<u16>().is_err();
    match text.split(',').find(bad) {
        None => Ok(()),
        Some(port) => Err(format!("{port:?} is not a port")),
    }
}

fn ranges(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Ok(());
    }
    text.split(',')
        .try_for_each(|range| Cidr::parse(range).map(drop))
}

fn ranges_or_all(text: &str) -> Result<(), String> {
    match text {
        "*" => Ok(()),
        text => ranges(text),
    }
}

const INJECT: &str = "sidecar.istio.io/inject";
const MODE: &str = "sidecar.istio.io/interceptionMode";
const INCLUDE_RANGES: &str = "traffic.sidecar.istio.io/includeOutboundIPRanges";
const EXCLUDE_RANGES: &str = "traffic.sidecar.istio.io/excludeOutboundIPRanges";
const INCLUDE_IN: &str = "traffic.sidecar.istio.io/includeInboundPorts";
const EXCLUDE_IN: &str = "traffic.sidecar.istio.io/excludeInboundPorts";
const INCLUDE_OUT: &str = "traffic.sidecar.istio.io/includeOutboundPorts";
const EXCLUDE_OUT: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
const EXCLUDE_INTERFACES: &str = "traffic.sidecar.istio.io/excludeInterfaces";
const KUBEVIRT: &str = "traffic.sidecar.istio.io/kubevirtInterfaces";
const REROUTE: &str = "istio.io/reroute-virtual-interfaces";

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod() -> Value {
        json!({
            "metadata": {"annotations": {"sidecar.istio.io/status": "{}"}},
            "spec": {"containers": [
                {"name": "app"},
                {"name": "istio-proxy", "args": ["proxy", "sidecar"], "env": []},
            ]},
        })
    }

    fn flags(pod: &Value) -> String {
        match judge("a/b", pod).unwrap() {
            Verdict::Capture(flags) => flags.join(" "),
            Verdict::Skip(why) => why,
        }
    }

    #[test]
    fn defaults_are_those_of_the_real_plugin() {
        assert_eq!(
            flags(&pod()),
            "-p 15001 -z 15006 -u 1337 -g 1337 -m REDIRECT -i * -x  -b * -d 15020,15021,15090 -o 15020 -q  -k  -c "
        );
    }

    #[test]
    fn annotations_and_the_proxys_settings_count() {
        let mut p = pod();
        let a = &mut p["metadata"]["annotations"];
        a[EXCLUDE_IN] = "8080, 15021".into();
        a[INCLUDE_RANGES] = "10.0.0.0/8".into();
        a[EXCLUDE_OUT] = "".into();
        a[KUBEVIRT] = "old0".into();
        a[REROUTE] = "new0".into();
        a[MODE] = "TPROXY".into();
        let proxy = &mut p["spec"]["containers"][1];
        proxy["securityContext"] = json!({"runAsUser": 0, "runAsGroup": 2001});
        proxy["env"] = json!([
            {"name": "INVALID_DROP", "value": "true"},
            {"name": "PROXY_CONFIG", "value": "{\"proxyMetadata\":{\"ISTIO_META_DNS_CAPTURE\":\"true\"}}"},
        ]);
        assert_eq!(
            flags(&p),
            "-p 15001 -z 15006 -u 1337 -g 2001 -m TPROXY -i 10.0.0.0/8 -x  -b * -d 8080,15021,15020,15090 -o  -q  \
             -k new0 -c  --redirect-dns --capture-all-dns --drop-invalid"
        );
    }

    #[test]
    fn pods_of_others_are_left_alone() {
        let skipped = |change: fn(&mut Value), why: &str| {
            let mut p = pod();
            change(&mut p);
            assert!(flags(&p).contains(why), "{}", flags(&p));
        };
        skipped(
            |p| p["spec"]["initContainers"] = json!([{"name": "istio-init"}]),
            "istio-init",
        );
        skipped(
            |p| p["spec"]["containers"][1]["name"] = "x".into(),
            "no istio-proxy",
        );
        skipped(
            |p| p["spec"]["containers"][1]["args"][1] = "router".into(),
            "no sidecar",
        );
        skipped(
            |p| p["metadata"]["labels"][INJECT] = "false".into(),
            "inject is false",
        );
        skipped(
            |p| p["metadata"]["annotations"] = json!({}),
            "status annotation",
        );
        skipped(
            |p| {
                p["spec"]["containers"][1]["env"] = json!([{"name": "DISABLE_ENVOY", "value": "1"}])
            },
            "DISABLE_ENVOY",
        );
        // A native sidecar is an init container.
        let mut p = pod();
        let proxy = p["spec"]["containers"][1].take();
        p["spec"]["containers"] = json!([{"name": "app"}]);
        p["spec"]["initContainers"] = json!([proxy]);
        assert!(flags(&p).starts_with("-p 15001"));
    }

    #[test]
    fn a_value_that_cannot_work_is_named() {
        for (key, value) in [
            (MODE, "NONE"),
            (INCLUDE_IN, "80,x"),
            (EXCLUDE_RANGES, "10.0.0.0/40"),
            (INCLUDE_RANGES, "*,10.0.0.0/8"),
        ] {
            let mut p = pod();
            p["metadata"]["annotations"][key] = value.into();
            let e = judge("a/b", &p).unwrap_err();
            assert!(e.to_string().contains(key) && e.code() == 100, "{e}");
        }
        for key in [EXCLUDE_INTERFACES, KUBEVIRT, REROUTE] {
            let mut p = pod();
            p["metadata"]["annotations"][MODE] = "EBPF".into();
            assert!(flags(&p).contains(" -m EBPF "));
            p["metadata"]["annotations"][key] = "eth7".into();
            let e = judge("a/b", &p).unwrap_err().to_string();
            assert!(
                e.contains(&format!("annotation {key}: ")) && e.contains("leave one"),
                "{e}"
            );
        }
    }
}
