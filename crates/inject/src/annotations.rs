//! The values that annotations may have. All mistakes are reported at once.

use base::cidr::Cidr;
use serde_json::Value;

use crate::{Error, quantity};

/// Checks the annotations of a pod.
pub fn validate(metadata: &Value) -> Result<(), Error> {
    let mut errors = Vec::new();
    for (name, value) in metadata["annotations"].as_object().into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        if let Err(why) = check(name, value) {
            errors.push(format!(
                "invalid value '{value}' for annotation '{name}': {why}"
            ));
        }
    }
    if errors.is_empty() {
        Ok(())
    } else {
        Err(Error::Annotations(errors))
    }
}

fn check(name: &str, value: &str) -> Result<(), String> {
    match name {
        "sidecar.istio.io/interceptionMode" => match value {
            // EBPF is ours; the message stays Istio's.
            "REDIRECT" | "TPROXY" | "EBPF" | "NONE" => Ok(()),
            _ => Err(format!(
                "interceptionMode invalid, use REDIRECT,TPROXY,NONE: {value}"
            )),
        },
        "status.sidecar.istio.io/port" => {
            port(value).map_err(|e| format!("excludeInboundPorts invalid: {e}"))
        }
        "readiness.status.sidecar.istio.io/initialDelaySeconds"
        | "readiness.status.sidecar.istio.io/periodSeconds"
        | "readiness.status.sidecar.istio.io/failureThreshold" => number(value, u32::MAX.into()),
        "traffic.sidecar.istio.io/includeOutboundIPRanges" if value == "*" => Ok(()),
        "traffic.sidecar.istio.io/includeOutboundIPRanges" => ranges("includeIPRanges", value),
        "traffic.sidecar.istio.io/excludeOutboundIPRanges" => ranges("excludeIPRanges", value),
        "traffic.sidecar.istio.io/includeInboundPorts" if value == "*" => Ok(()),
        "traffic.sidecar.istio.io/includeInboundPorts" => ports("includeInboundPorts", value),
        "traffic.sidecar.istio.io/excludeInboundPorts" => ports("excludeInboundPorts", value),
        "traffic.sidecar.istio.io/excludeOutboundPorts" => ports("excludeOutboundPorts", value),
        "traffic.sidecar.istio.io/excludeInterfaces"
        | "traffic.sidecar.istio.io/kubevirtInterfaces"
        | "istio.io/reroute-virtual-interfaces" => interfaces(value),
        "prometheus.istio.io/merge-metrics" => truth(value).map(drop),
        "sidecar.istio.io/proxyCPU"
        | "sidecar.istio.io/proxyMemory"
        | "sidecar.istio.io/proxyCPULimit"
        | "sidecar.istio.io/proxyMemoryLimit" => {
            if value.chars().any(char::is_control) {
                return Err("value contains control characters".into());
            }
            quantity::canonical(value).map(drop)
        }
        // proxy.istio.io/config is read, and so checked, where it is merged.
        _ => Ok(()),
    }
}

/// A truth value as Go's strconv.ParseBool reads it.
pub fn truth(value: &str) -> Result<bool, String> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!(
            "strconv.ParseBool: parsing {value:?}: invalid syntax"
        )),
    }
}

fn number(value: &str, max: u64) -> Result<(), String> {
    let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    match value.parse::<u64>() {
        Ok(n) if digits && n <= max => Ok(()),
        _ if digits => Err(format!(
            "strconv.ParseUint: parsing {value:?}: value out of range"
        )),
        _ => Err(format!(
            "strconv.ParseUint: parsing {value:?}: invalid syntax"
        )),
    }
}

fn port(value: &str) -> Result<(), String> {
    number(value.trim(), u16::MAX.into()).map_err(|e| format!("failed parsing port '{value}': {e}"))
}

fn ports(what: &str, list: &str) -> Result<(), String> {
    if list.trim().is_empty() {
        return Ok(());
    }
    list.trim().split(',').try_for_each(|p| {
        port(p).map_err(|e| format!("{what} invalid: failed parsing port '{p}': {e}"))
    })
}

fn ranges(what: &str, list: &str) -> Result<(), String> {
    if list.is_empty() {
        return Ok(());
    }
    list.split(',').try_for_each(|c| {
        Cidr::parse(c)
            .map(drop)
            .map_err(|e| format!("{what} invalid: failed parsing cidr '{c}': {e}"))
    })
}

/// Names that the kernel takes.
fn interfaces(list: &str) -> Result<(), String> {
    for name in list.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        let wrong = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if name.len() > 15 || name == "." || name == ".." || name.contains(wrong) {
            return Err(format!(
                "invalid interface name {name:?}: up to 15 characters, no space, slash or colon"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_mistake_is_named_at_once() {
        let metadata = json!({"annotations": {
            "sidecar.istio.io/interceptionMode": "tproxy",
            "status.sidecar.istio.io/port": "70000",
            "traffic.sidecar.istio.io/excludeInboundPorts": "80,x",
            "traffic.sidecar.istio.io/includeOutboundIPRanges": "10.0.0.0/8, 1.2.3.4/8",
            "traffic.sidecar.istio.io/includeInboundPorts": "*",
            "sidecar.istio.io/proxyCPU": "fast",
            "other": "x",
        }});
        let text = validate(&metadata).unwrap_err().to_string();
        assert!(
            text.starts_with("failed to run injection template: 5 errors occurred:\n\t* "),
            "{text}"
        );
        for line in [
            "invalid value 'tproxy' for annotation 'sidecar.istio.io/interceptionMode': interceptionMode invalid, use REDIRECT,TPROXY,NONE: tproxy",
            "failed parsing port '70000': strconv.ParseUint: parsing \"70000\": value out of range",
            "excludeInboundPorts invalid: failed parsing port 'x': failed parsing port 'x': strconv.ParseUint: parsing \"x\": invalid syntax",
            "includeIPRanges invalid: failed parsing cidr ' 1.2.3.4/8': netip.ParsePrefix(\" 1.2.3.4/8\"): ParseAddr(\" 1.2.3.4\"): unexpected character (at \" 1.2.3.4\")",
        ] {
            assert!(text.contains(line), "{text}\nlacks {line}");
        }
    }
}
