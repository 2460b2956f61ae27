//! The settings of istio-iptables: flags, environment, defaults, validation, and the block that it logs.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use base::cidr::Cidr;

use crate::{
    Error, flags, options, routes,
    surroundings::{self, Addresses},
};

/// Every setting. Lists stay the text that the user gave: what they mean is decided where the rules are built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where captured outbound connections go (`-p`).
    pub proxy_port: String,
    /// Where captured inbound connections go (`-z`).
    pub inbound_capture_port: String,
    /// The port of HBONE, never captured (`-e`).
    pub inbound_tunnel_port: String,
    /// Users whose traffic is the proxy's own (`-u`), comma-separated.
    pub proxy_uid: String,
    /// Groups whose traffic is the proxy's own (`-g`), comma-separated.
    pub proxy_gid: String,
    /// `TPROXY` or `EBPF`; anything else is REDIRECT (`-m`).
    pub inbound_interception_mode: String,
    /// Firewall mark of TPROXY (`-t`).
    pub inbound_tproxy_mark: String,
    /// Routing table of TPROXY (`-r`).
    pub inbound_tproxy_route_table: String,
    /// Inbound ports captured: empty, `*` or a list (`-b`).
    pub inbound_ports_include: String,
    /// Inbound ports left alone when `-b` is `*` (`-d`).
    pub inbound_ports_exclude: String,
    /// Groups whose outbound traffic is captured; `*` is everyone (`ISTIO_OUTBOUND_OWNER_GROUPS`).
    pub owner_groups_include: String,
    /// Groups whose outbound traffic is left alone (`ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE`).
    pub owner_groups_exclude: String,
    /// Outbound ports always captured (`-q`).
    pub outbound_ports_include: String,
    /// Outbound ports never captured (`-o`).
    pub outbound_ports_exclude: String,
    /// Destinations captured: empty, `*` or ranges (`-i`).
    pub outbound_ip_ranges_include: String,
    /// Destinations left alone (`-x`).
    pub outbound_ip_ranges_exclude: String,
    /// Interfaces whose incoming traffic counts as outbound (`-k`).
    pub kube_virt_interfaces: String,
    /// Interfaces that are left alone altogether (`-c`).
    pub exclude_interfaces: String,
    /// Print, do not apply (`-n`).
    pub dry_run: bool,
    /// Port that the self-test connects to.
    pub iptables_probe_port: u16,
    /// How long the self-test may take.
    pub probe_timeout: Duration,
    /// Apply nothing; for the self-test alone.
    pub skip_rule_apply: bool,
    /// Run the self-test.
    pub run_validation: bool,
    /// Capture DNS queries to the resolvers of /etc/resolv.conf.
    pub redirect_dns: bool,
    /// Capture every DNS query.
    pub capture_all_dns: bool,
    /// Drop packets that connection tracking calls invalid.
    pub drop_invalid: bool,
    /// Look for an IPv6 address among all, not only at the first.
    pub dual_stack: bool,
    /// Path of the network namespace to work in; empty is this one.
    pub network_namespace: String,
    /// Run from the host's file system, as the CNI plug-in does.
    pub cni_mode: bool,
    /// Replace other ISTIO rules.
    pub reconcile: bool,
    /// Remove, apply nothing.
    pub cleanup_only: bool,
    /// Apply although the rules are in place.
    pub force_apply: bool,
    /// Use nft instead of iptables.
    pub native_nftables: bool,
    /// `legacy`, `nft` or empty: found out.
    pub force_iptables_binary: String,
    /// Whose rules are written: `1.3`, `1.5`, `1.13` or `current` (ours, not a flag of istio-iptables).
    pub rules_version: String,
    /// TPROXY: inbound connections are kept out of connection tracking (ours).
    pub tproxy_notrack: bool,
    /// EBPF: the pod's cgroup; empty is this process's (ours, as the next three).
    pub ebpf_cgroup: String,
    /// EBPF: between whom bytes pass by the TCP stack: `off`, `pod` (app and proxy), `proxies` (of this node, or of
    /// those with the same NAME: `proxies=NAME`), or `node` (both).
    pub ebpf_sockmap: String,
    /// EBPF: programs that are not used, comma-separated; what needs them is left to iptables.
    pub ebpf_without: String,
    /// EBPF: leave to iptables what the kernel's programs cannot do.
    pub ebpf_fallback: bool,
    /// What counts as loopback in the IPv4 rules (`ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`).
    pub host_ipv4_loopback_cidr: String,
    /// Whether IPv6 is captured; found from the pod's addresses.
    pub enable_inbound_ipv6: bool,
    /// IPv4 resolvers, found in /etc/resolv.conf.
    pub dns_servers_v4: Vec<IpAddr>,
    /// IPv6 resolvers.
    pub dns_servers_v6: Vec<IpAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            proxy_port: "15001".into(),
            inbound_capture_port: "15006".into(),
            inbound_tunnel_port: "15008".into(),
            proxy_uid: String::new(),
            proxy_gid: String::new(),
            inbound_interception_mode: String::new(),
            inbound_tproxy_mark: "1337".into(),
            inbound_tproxy_route_table: "133".into(),
            inbound_ports_include: String::new(),
            inbound_ports_exclude: String::new(),
            owner_groups_include: "*".into(),
            owner_groups_exclude: String::new(),
            outbound_ports_include: String::new(),
            outbound_ports_exclude: String::new(),
            outbound_ip_ranges_include: String::new(),
            outbound_ip_ranges_exclude: String::new(),
            kube_virt_interfaces: String::new(),
            exclude_interfaces: String::new(),
            dry_run: false,
            iptables_probe_port: 15002,
            probe_timeout: Duration::from_secs(5),
            skip_rule_apply: false,
            run_validation: false,
            redirect_dns: false,
            capture_all_dns: false,
            drop_invalid: false,
            dual_stack: false,
            network_namespace: String::new(),
            cni_mode: false,
            reconcile: false,
            cleanup_only: false,
            force_apply: false,
            native_nftables: false,
            force_iptables_binary: String::new(),
            rules_version: "current".into(),
            tproxy_notrack: false,
            ebpf_cgroup: String::new(),
            ebpf_sockmap: "off".into(),
            ebpf_without: String::new(),
            ebpf_fallback: false,
            host_ipv4_loopback_cidr: "127.0.0.1/32".into(),
            enable_inbound_ipv6: false,
            dns_servers_v4: Vec::new(),
            dns_servers_v6: Vec::new(),
        }
    }
}

/// Reads one variable of the environment.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Config {
    /// Flags over environment over defaults. `args` are those after the command's own name.
    pub fn from_args(args: &[String], env: Environment<'_>) -> Result<Config, Error> {
        let given = flags::parse(options::FLAGS, args)?;
        let mut values = options::from_environment(env);
        values.extend(given);
        let mut config = Config::default();
        for (name, value) in values {
            config.set(name, &value);
        }
        if let Some(groups) = env("ISTIO_OUTBOUND_OWNER_GROUPS") {
            config.owner_groups_include = groups;
        }
        if let Some(groups) = env("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE") {
            config.owner_groups_exclude = groups;
        }
        if let Some(cidr) = env("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR") {
            config.host_ipv4_loopback_cidr = cidr;
        }
        if config.proxy_uid.is_empty() {
            let user = env("ENVOY_USER").unwrap_or_else(|| "istio-proxy".into());
            config.proxy_uid = surroundings::user_id(&user).unwrap_or_else(|| "1337".into());
        }
        if config.proxy_gid.is_empty() {
            config.proxy_gid = config.proxy_uid.clone();
        }
        Ok(config)
    }

    /// Takes in what only the pod itself can tell: its addresses and its resolvers.
    pub fn fill_from_pod(&mut self, addresses: &Addresses) -> Result<(), Error> {
        self.enable_inbound_ipv6 = addresses.ipv6(self.dual_stack)?;
        if self.redirect_dns && !self.capture_all_dns {
            let servers = surroundings::resolvers("/etc/resolv.conf")?;
            (self.dns_servers_v4, self.dns_servers_v6) =
                servers.into_iter().partition(IpAddr::is_ipv4);
        }
        Ok(())
    }

    /// Refuses what istio-iptables refuses before it touches anything.
    pub fn validate(&self) -> Result<(), Error> {
        self.check_text()?;
        let groups = split(&self.owner_groups_include);
        if self.owner_groups_include != "*" && groups.len() > MAX_OWNER_GROUPS {
            return Err(Error::Invalid(format!(
                "number of owner groups whose outgoing traffic should be redirected to Envoy cannot exceed \
                 {MAX_OWNER_GROUPS}, got {}: [{}]",
                groups.len(),
                groups.join(" ")
            )));
        }
        match self.force_iptables_binary.as_str() {
            "" | "legacy" | "nft" => {}
            other => {
                return Err(Error::Invalid(format!(
                    "invalid FORCE_IPTABLES_BINARY value {other:?}: use \"legacy\" or \"nft\""
                )));
            }
        }
        self.loopback()?;
        self.check_version()?;
        self.check_ebpf()?;
        self.check_notrack()?;
        // Before any rule is written: half a capture is worse than none.
        routes::check(self)
    }

    /// Values become words of iptables' and nft's input, which lines and quotes would end.
    fn check_text(&self) -> Result<(), Error> {
        for (flag, value) in [
            ("--envoy-port", &self.proxy_port),
            ("--inbound-capture-port", &self.inbound_capture_port),
            ("--inbound-tunnel-port", &self.inbound_tunnel_port),
            ("--proxy-uid", &self.proxy_uid),
            ("--proxy-gid", &self.proxy_gid),
            ("--istio-inbound-tproxy-mark", &self.inbound_tproxy_mark),
            ("--istio-inbound-ports", &self.inbound_ports_include),
            ("--istio-local-exclude-ports", &self.inbound_ports_exclude),
            ("--istio-outbound-ports", &self.outbound_ports_include),
            (
                "--istio-local-outbound-ports-exclude",
                &self.outbound_ports_exclude,
            ),
            ("--istio-exclude-interfaces", &self.exclude_interfaces),
            ("--kube-virt-interfaces", &self.kube_virt_interfaces),
            ("ISTIO_OUTBOUND_OWNER_GROUPS", &self.owner_groups_include),
            (
                "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE",
                &self.owner_groups_exclude,
            ),
        ] {
            if value
                .chars()
                .any(|c| c.is_control() || matches!(c, '"' | '\'' | '\\'))
            {
                return Err(Error::Invalid(format!(
                    "invalid value {value:?} for {flag}: lines and quotes have no place in it"
                )));
            }
            // iptables would be asked for a port, a user or an interface without a name; excluded ports count beside `*`.
            let unused = flag == "--istio-local-exclude-ports" && self.inbound_ports_include != "*";
            if !unused
                && value
                    .split(',')
                    .any(|e| !e.is_empty() && e.trim().is_empty())
            {
                return Err(Error::Invalid(format!(
                    "invalid value {value:?} for {flag}: it has an entry of blanks alone"
                )));
            }
        }
        Ok(())
    }

    /// Older rules are written for what older documents show; what is asked beyond that is refused.
    fn check_version(&self) -> Result<(), Error> {
        let version = &self.rules_version;
        match version.as_str() {
            "current" => return Ok(()),
            "1.3" | "1.5" | "1.13" => {}
            other => {
                return Err(Error::Invalid(format!(
                    "invalid value {other:?} for --rules-version: use 1.3, 1.5, 1.13 or current"
                )));
            }
        }
        let groups = self.owner_groups_include != "*" || !self.owner_groups_exclude.is_empty();
        for (asked, flag) in [
            (self.tproxy(), "--istio-inbound-interception-mode=TPROXY"),
            (self.redirect_dns, "--redirect-dns"),
            (self.drop_invalid, "--drop-invalid"),
            (self.native_nftables, "--native-nftables"),
            (
                !self.exclude_interfaces.is_empty(),
                "--istio-exclude-interfaces",
            ),
            (groups, "ISTIO_OUTBOUND_OWNER_GROUPS"),
        ] {
            if asked {
                return Err(Error::Invalid(format!(
                    "{flag} does not go with --rules-version={version}: leave one of them out"
                )));
            }
        }
        Ok(())
    }

    /// Programs see sockets, not packets: what asks about a packet's way is refused.
    fn check_ebpf(&self) -> Result<(), Error> {
        match self.ebpf_sockmap.as_str() {
            "" | "off" | "pod" | "proxies" | "node" => {}
            named
                if named.split_once('=').is_some_and(|(what, name)| {
                    matches!(what, "proxies" | "node") && is_name(name)
                }) => {}
            other => {
                return Err(Error::Invalid(format!(
                    "invalid value {other:?} for --ebpf-sockmap: use off, pod, proxies or node, the last two \
                     also with =NAME (letters, digits and -)"
                )));
            }
        }
        if !self.ebpf() {
            return Ok(());
        }
        for (asked, flag) in [
            (
                !self.exclude_interfaces.is_empty(),
                "--istio-exclude-interfaces",
            ),
            (
                !self.kube_virt_interfaces.is_empty(),
                "--kube-virt-interfaces",
            ),
            (self.drop_invalid, "--drop-invalid"),
            (self.rules_version != "current", "--rules-version"),
        ] {
            if asked {
                return Err(Error::Invalid(format!(
                    "{flag} does not go with --istio-inbound-interception-mode=EBPF: leave one of them out"
                )));
            }
        }
        Ok(())
    }

    /// Without tracking there are no states, and nothing that could be translated.
    fn check_notrack(&self) -> Result<(), Error> {
        if !self.tproxy_notrack || self.cleanup_only {
            return Ok(());
        }
        if !self.tproxy() || self.inbound_ports_include.is_empty() {
            return Err(Error::Invalid(
                "--tproxy-notrack needs --istio-inbound-interception-mode=TPROXY and --istio-inbound-ports: other \
                 modes translate what comes in, or do not track it anyway"
                    .into(),
            ));
        }
        for (asked, flag) in [
            (
                !self.kube_virt_interfaces.is_empty(),
                "--kube-virt-interfaces",
            ),
            (self.drop_invalid, "--drop-invalid"),
            (self.native_nftables, "--native-nftables"),
            (
                self.inbound_tproxy_mark == ANSWER_MARK,
                "--istio-inbound-tproxy-mark=1339",
            ),
        ] {
            if asked {
                return Err(Error::Invalid(format!(
                    "{flag} does not go with --tproxy-notrack: leave one of them out"
                )));
            }
        }
        Ok(())
    }

    /// What counts as IPv4 loopback.
    pub fn loopback(&self) -> Result<Cidr, Error> {
        let text = &self.host_ipv4_loopback_cidr;
        let cidr = Cidr::parse(text)
            .map_err(|why| Error::Invalid(format!("failed to parse CIDR {text}: {why}")))?;
        match cidr.addr {
            IpAddr::V4(a) if a.is_loopback() => {}
            found => {
                return Err(Error::Invalid(format!(
                    "expected valid IPv4 loopback address in CIDR {text}; found {found}"
                )));
            }
        }
        if cidr.bits < 8 {
            return Err(Error::Invalid(format!(
                "expected CIDR {text} to have mask in range [8, 32]; found {}",
                cidr.bits
            )));
        }
        Ok(cidr)
    }

    /// Whether inbound traffic is steered by TPROXY.
    pub fn tproxy(&self) -> bool {
        self.inbound_interception_mode == "TPROXY"
    }

    /// Whether eBPF programs capture.
    pub fn ebpf(&self) -> bool {
        self.inbound_interception_mode == "EBPF"
    }

    /// Whether the address that Envoy's passthrough binds to counts as loopback, which disarms the self-call rules.
    pub fn passthrough_is_loopback(&self) -> bool {
        self.loopback()
            .is_ok_and(|c| c.contains(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6))))
    }

    /// The settings as istio-iptables logs them: what the environment says, then what is used.
    pub fn log(&self, env: Environment<'_>) -> String {
        let mut out = String::from("Istio iptables environment:\n");
        for name in LOGGED_ENVIRONMENT {
            out.push_str(&format!("{name}={}\n", env(name).unwrap_or_default()));
        }
        out.push_str("\nIstio config:\n");
        let addresses = |a: &[IpAddr]| {
            let list: Vec<String> = a.iter().map(IpAddr::to_string).collect();
            format!("[{}]", list.join(" "))
        };
        let dns = format!(
            "{},{}",
            addresses(&self.dns_servers_v4),
            addresses(&self.dns_servers_v6)
        );
        let lines: [(&str, &dyn std::fmt::Display); 28] = [
            ("PROXY_PORT", &self.proxy_port),
            ("PROXY_INBOUND_CAPTURE_PORT", &self.inbound_capture_port),
            ("PROXY_TUNNEL_PORT", &self.inbound_tunnel_port),
            ("PROXY_UID", &self.proxy_uid),
            ("PROXY_GID", &self.proxy_gid),
            ("INBOUND_INTERCEPTION_MODE", &self.inbound_interception_mode),
            ("INBOUND_TPROXY_MARK", &self.inbound_tproxy_mark),
            (
                "INBOUND_TPROXY_ROUTE_TABLE",
                &self.inbound_tproxy_route_table,
            ),
            ("INBOUND_PORTS_INCLUDE", &self.inbound_ports_include),
            ("INBOUND_PORTS_EXCLUDE", &self.inbound_ports_exclude),
            ("OUTBOUND_OWNER_GROUPS_INCLUDE", &self.owner_groups_include),
            ("OUTBOUND_OWNER_GROUPS_EXCLUDE", &self.owner_groups_exclude),
            (
                "OUTBOUND_IP_RANGES_INCLUDE",
                &self.outbound_ip_ranges_include,
            ),
            (
                "OUTBOUND_IP_RANGES_EXCLUDE",
                &self.outbound_ip_ranges_exclude,
            ),
            ("OUTBOUND_PORTS_INCLUDE", &self.outbound_ports_include),
            ("OUTBOUND_PORTS_EXCLUDE", &self.outbound_ports_exclude),
            ("KUBE_VIRT_INTERFACES", &self.kube_virt_interfaces),
            ("ENABLE_INBOUND_IPV6", &self.enable_inbound_ipv6),
            ("DUAL_STACK", &self.dual_stack),
            ("DNS_CAPTURE", &self.redirect_dns),
            ("DROP_INVALID", &self.drop_invalid),
            ("CAPTURE_ALL_DNS", &self.capture_all_dns),
            ("DNS_SERVERS", &dns),
            ("NETWORK_NAMESPACE", &self.network_namespace),
            ("CNI_MODE", &self.cni_mode),
            ("EXCLUDE_INTERFACES", &self.exclude_interfaces),
            ("RECONCILE", &self.reconcile),
            ("FORCE_IPTABLES_BINARY", &self.force_iptables_binary),
        ];
        for (name, value) in lines {
            out.push_str(&format!("{name}={value}\n"));
        }
        out
    }

    /// Sets one flag; its value was checked by [`flags::parse`] or by [`options::from_environment`].
    fn set(&mut self, name: &str, value: &str) {
        let on = flags::switch(value).unwrap_or(false);
        let text = match name {
            "envoy-port" => &mut self.proxy_port,
            "inbound-capture-port" => &mut self.inbound_capture_port,
            "inbound-tunnel-port" => &mut self.inbound_tunnel_port,
            "proxy-uid" => &mut self.proxy_uid,
            "proxy-gid" => &mut self.proxy_gid,
            "istio-inbound-interception-mode" | "mode" => &mut self.inbound_interception_mode,
            "istio-inbound-ports" => &mut self.inbound_ports_include,
            "istio-local-exclude-ports" => &mut self.inbound_ports_exclude,
            "istio-exclude-interfaces" => &mut self.exclude_interfaces,
            "istio-service-cidr" => &mut self.outbound_ip_ranges_include,
            "istio-service-exclude-cidr" => &mut self.outbound_ip_ranges_exclude,
            "istio-outbound-ports" => &mut self.outbound_ports_include,
            "istio-local-outbound-ports-exclude" => &mut self.outbound_ports_exclude,
            "kube-virt-interfaces" => &mut self.kube_virt_interfaces,
            "istio-inbound-tproxy-mark" => &mut self.inbound_tproxy_mark,
            "istio-inbound-tproxy-route-table" => &mut self.inbound_tproxy_route_table,
            "network-namespace" => &mut self.network_namespace,
            "force-iptables-binary" => &mut self.force_iptables_binary,
            "rules-version" => &mut self.rules_version,
            "ebpf-cgroup" => &mut self.ebpf_cgroup,
            "ebpf-sockmap" => &mut self.ebpf_sockmap,
            "ebpf-without" => &mut self.ebpf_without,
            "tproxy-notrack" => return self.tproxy_notrack = on,
            "ebpf-fallback" => return self.ebpf_fallback = on,
            "dry-run" => return self.dry_run = on,
            "skip-rule-apply" => return self.skip_rule_apply = on,
            "run-validation" => return self.run_validation = on,
            "redirect-dns" => return self.redirect_dns = on,
            "capture-all-dns" => return self.capture_all_dns = on,
            "drop-invalid" => return self.drop_invalid = on,
            "dual-stack" => return self.dual_stack = on,
            "cni-mode" => return self.cni_mode = on,
            "reconcile" => return self.reconcile = on,
            "cleanup-only" => return self.cleanup_only = on,
            "force-apply" => return self.force_apply = on,
            "native-nftables" => return self.native_nftables = on,
            "iptables-probe-port" => {
                self.iptables_probe_port = flags::number(value).unwrap_or(15002);
                return;
            }
            "probe-timeout" => {
                self.probe_timeout = flags::duration(value).unwrap_or(Duration::from_secs(5));
                return;
            }
            // Taken without effect: see FLAGS.
            _ => return,
        };
        *text = value.into();
    }
}

/// A comma-separated list: empty entries are dropped, and spaces around an entry, which iptables never sees.
pub fn split(list: &str) -> Vec<&str> {
    list.split(',')
        .map(str::trim)
        .filter(|s| !s.is_empty())
        .collect()
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// The firewall mark of the proxy's answers with `--tproxy-notrack`: next to Istio's 1337 and 1338.
pub(crate) const ANSWER_MARK: &str = "1339";

/// They all become matches of one rule, and iptables takes no more.
const MAX_OWNER_GROUPS: usize = 64;

const LOGGED_ENVIRONMENT: &[&str] = &[
    "ENVOY_PORT",
    "INBOUND_CAPTURE_PORT",
    "ISTIO_INBOUND_INTERCEPTION_MODE",
    "ISTIO_INBOUND_TPROXY_ROUTE_TABLE",
    "ISTIO_INBOUND_PORTS",
    "ISTIO_OUTBOUND_PORTS",
    "ISTIO_LOCAL_EXCLUDE_PORTS",
    "ISTIO_EXCLUDE_INTERFACES",
    "ISTIO_SERVICE_CIDR",
    "ISTIO_SERVICE_EXCLUDE_CIDR",
    "ISTIO_META_DNS_CAPTURE",
    "INVALID_DROP",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &[&str], env: &[(&str, &str)]) -> Config {
        let args: Vec<String> = args.iter().map(|a| a.to_string()).collect();
        let env: Vec<(String, String)> = env
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        Config::from_args(&args, &|name| {
            env.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone())
        })
        .unwrap()
    }

    #[test]
    fn flags_beat_environment_and_bad_environment_is_the_default() {
        let env = [
            ("ENVOY_PORT", "1"),
            ("INBOUND_CAPTURE_PORT", "2"),
            ("PROXY_UID", "7"),
            ("REDIRECT_DNS", "true"),
            ("ISTIO_META_DNS_CAPTURE", "false"),
            ("INVALID_DROP", "perhaps"),
            ("ISTIO_DUAL_STACK", "1"),
            ("IPTABLES_PROBE_PORT", "99999"),
        ];
        let c = config(&["-z3", "--log_output_level=default:info", "-f"], &env);
        assert_eq!(c.proxy_port, "15001");
        assert_eq!(c.inbound_capture_port, "3");
        assert_eq!((c.proxy_uid.as_str(), c.proxy_gid.as_str()), ("7", "7"));
        assert!(!c.redirect_dns && !c.drop_invalid && c.dual_stack);
        assert_eq!(c.iptables_probe_port, 15002);
        assert_eq!(c.owner_groups_include, "*");
    }

    /// Long name, short name, variable, a value, and the setting that it becomes; one row a flag of istio-iptables.
    type Row = (
        &'static str,
        char,
        &'static str,
        &'static str,
        fn(&Config) -> String,
    );

    #[rustfmt::skip]
    const ROWS: &[Row] = &[
        ("envoy-port", 'p', "", "1", |c| c.proxy_port.to_string()),
        ("inbound-capture-port", 'z', "INBOUND_CAPTURE_PORT", "2", |c| c.inbound_capture_port.to_string()),
        ("inbound-tunnel-port", 'e', "INBOUND_TUNNEL_PORT", "3", |c| c.inbound_tunnel_port.to_string()),
        ("proxy-uid", 'u', "PROXY_UID", "4", |c| c.proxy_uid.to_string()),
        ("proxy-gid", 'g', "PROXY_GID", "5", |c| c.proxy_gid.to_string()),
        ("istio-inbound-interception-mode", 'm', "ISTIO_INBOUND_INTERCEPTION_MODE", "TPROXY", |c| c.inbound_interception_mode.to_string()),
        ("istio-inbound-ports", 'b', "ISTIO_INBOUND_PORTS", "6", |c| c.inbound_ports_include.to_string()),
        ("istio-local-exclude-ports", 'd', "ISTIO_LOCAL_EXCLUDE_PORTS", "7", |c| c.inbound_ports_exclude.to_string()),
        ("istio-exclude-interfaces", 'c', "ISTIO_EXCLUDE_INTERFACES", "eth1", |c| c.exclude_interfaces.to_string()),
        ("istio-service-cidr", 'i', "ISTIO_SERVICE_CIDR", "*", |c| c.outbound_ip_ranges_include.to_string()),
        ("istio-service-exclude-cidr", 'x', "ISTIO_SERVICE_EXCLUDE_CIDR", "10.0.0.0/8", |c| c.outbound_ip_ranges_exclude.to_string()),
        ("istio-outbound-ports", 'q', "ISTIO_OUTBOUND_PORTS", "8", |c| c.outbound_ports_include.to_string()),
        ("istio-local-outbound-ports-exclude", 'o', "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE", "9", |c| c.outbound_ports_exclude.to_string()),
        ("kube-virt-interfaces", 'k', "KUBE_VIRT_INTERFACES", "tap0", |c| c.kube_virt_interfaces.to_string()),
        ("istio-inbound-tproxy-mark", 't', "ISTIO_INBOUND_TPROXY_MARK", "10", |c| c.inbound_tproxy_mark.to_string()),
        ("istio-inbound-tproxy-route-table", 'r', "ISTIO_INBOUND_TPROXY_ROUTE_TABLE", "11", |c| c.inbound_tproxy_route_table.to_string()),
        ("network-namespace", ' ', "NETWORK_NAMESPACE", "/run/x", |c| c.network_namespace.to_string()),
        ("force-iptables-binary", ' ', "FORCE_IPTABLES_BINARY", "nft", |c| c.force_iptables_binary.to_string()),
        ("dry-run", 'n', "DRY_RUN", "true", |c| c.dry_run.to_string()),
        ("iptables-probe-port", ' ', "IPTABLES_PROBE_PORT", "12", |c| c.iptables_probe_port.to_string()),
        ("probe-timeout", ' ', "PROBE_TIMEOUT", "1m30s", |c| format!("{:?}", c.probe_timeout)),
        ("skip-rule-apply", ' ', "SKIP_RULE_APPLY", "true", |c| c.skip_rule_apply.to_string()),
        ("run-validation", ' ', "RUN_VALIDATION", "true", |c| c.run_validation.to_string()),
        ("redirect-dns", ' ', "ISTIO_META_DNS_CAPTURE", "true", |c| c.redirect_dns.to_string()),
        ("capture-all-dns", ' ', "CAPTURE_ALL_DNS", "true", |c| c.capture_all_dns.to_string()),
        ("drop-invalid", ' ', "INVALID_DROP", "true", |c| c.drop_invalid.to_string()),
        ("dual-stack", ' ', "ISTIO_DUAL_STACK", "true", |c| c.dual_stack.to_string()),
        ("cni-mode", ' ', "CNI_MODE", "true", |c| c.cni_mode.to_string()),
        ("reconcile", ' ', "RECONCILE", "true", |c| c.reconcile.to_string()),
        ("cleanup-only", ' ', "CLEANUP_ONLY", "true", |c| c.cleanup_only.to_string()),
        ("force-apply", ' ', "FORCE_APPLY", "true", |c| c.force_apply.to_string()),
        ("native-nftables", ' ', "NATIVE_NFTABLES", "true", |c| c.native_nftables.to_string()),
    ];

    #[test]
    fn every_flag_has_its_names_and_its_variable() {
        for (long, short, variable, value, read) in ROWS {
            let shown = if *value == "1m30s" { "90s" } else { value };
            let untouched = read(&config(&[], &[]));
            assert_ne!(untouched, shown, "{long}");
            let with = |text: String| read(&config(&[&text], &[]));
            assert_eq!(with(format!("--{long}={value}")), shown, "--{long}");
            if *short != ' ' {
                assert_eq!(with(format!("-{short}={value}")), shown, "-{short}");
            }
            if variable.is_empty() {
                // Kubernetes sets ENVOY_PORT for a service of that name.
                let name = long.to_uppercase().replace('-', "_");
                assert_eq!(read(&config(&[], &[(&name, value)])), untouched, "{name}");
            } else {
                assert_eq!(
                    read(&config(&[], &[(variable, value)])),
                    shown,
                    "{variable}"
                );
            }
        }
    }

    #[test]
    fn values_that_cannot_work_are_refused() {
        let groups: Vec<String> = (0..65).map(|n| n.to_string()).collect();
        for (key, value, error) in [
            (
                "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
                "10.0.0.0/8",
                "expected valid IPv4 loopback address in CIDR 10.0.0.0/8; found 10.0.0.0",
            ),
            (
                "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
                "127.0.0.1/7",
                "expected CIDR 127.0.0.1/7 to have mask in range [8, 32]; found 7",
            ),
            (
                "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
                "",
                "failed to parse CIDR : netip.ParsePrefix(\"\"): no '/'",
            ),
            (
                "ISTIO_OUTBOUND_OWNER_GROUPS",
                &groups.join(","),
                "cannot exceed 64, got 65",
            ),
            (
                "FORCE_IPTABLES_BINARY",
                "nftables",
                "use \"legacy\" or \"nft\"",
            ),
        ] {
            let e = config(&[], &[(key, value)])
                .validate()
                .unwrap_err()
                .to_string();
            assert!(e.contains(error), "{e}");
        }
        for (args, error) in [
            (
                &["-b", "80\n-A OUTPUT -j ACCEPT"][..],
                "for --istio-inbound-ports: lines",
            ),
            (&["-c", "eth7\""], "for --istio-exclude-interfaces: lines"),
            (
                &["-b", " "],
                "for --istio-inbound-ports: it has an entry of blanks",
            ),
            (
                &["-q", "80, ,90"],
                "for --istio-outbound-ports: it has an entry of blanks",
            ),
            (
                &["-m", "TPROXY", "-b", "*", "-t", "0x10"],
                "failed to parse InboundTProxyMark: strconv.Atoi: parsing \"0x10\": invalid syntax",
            ),
            (
                &["-m", "TPROXY", "-b", "80", "-r", "x"],
                "failed to parse InboundTProxyRouteTable: strconv.Atoi: parsing \"x\"",
            ),
        ] {
            let e = config(args, &[]).validate().unwrap_err().to_string();
            assert!(e.contains(error), "{e}");
        }
        // Without inbound ports nothing is routed by the mark.
        assert!(
            config(&["-m", "TPROXY", "-t", "0x10"], &[])
                .validate()
                .is_ok()
        );
        assert!(
            config(&[], &[("ISTIO_OUTBOUND_OWNER_GROUPS", "")])
                .validate()
                .is_ok()
        );
    }
}
