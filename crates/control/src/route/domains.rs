//! The names under which a client may call a service: the `domains` of its virtual host.

use crate::names::{bracketed, host_port};

/// The domains of one virtual host, and which of them are short or otherwise derived forms of a host: those yield to
/// another host's full name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Domains {
    pub all: Vec<String>,
    pub derived: Vec<String>,
}

/// How names of one virtual host are written.
#[derive(Debug, Clone, Copy)]
pub struct Style<'a> {
    /// The client's DNS domain: `NAMESPACE.svc.cluster.local`.
    pub client_domain: &'a str,
    /// The port is given beside the bare name (`http_proxy` listeners and gRPC clients look at it).
    pub port: Option<u32>,
    /// Names that end with a dot are served too.
    pub absolute: bool,
}

impl Style<'_> {
    /// The domains of a service: its host and its short forms, those of its aliases, pods of a headless service, its
    /// addresses.
    pub fn service<'h>(
        &self,
        hosts: impl IntoIterator<Item = &'h str>,
        headless: bool,
        addresses: impl IntoIterator<Item = &'h str>,
    ) -> Domains {
        let mut out = Domains::default();
        for host in hosts {
            self.push(&mut out.all, host);
            let derived = self.derived(host);
            out.all.extend(derived.iter().cloned());
            out.derived.extend(derived);
        }
        if headless {
            let pods: Vec<String> = out.all.iter().map(|d| format!("*.{d}")).collect();
            out.all.extend(pods);
        }
        for address in addresses {
            self.push(&mut out.all, address);
        }
        out
    }

    /// Other names of a host: absolute, and shorter as far as the client shares the domain.
    pub fn derived(&self, host: &str) -> Vec<String> {
        let mut out = Vec::new();
        if self.absolute {
            if host.parse::<std::net::IpAddr>().is_err() {
                out.push(format!("{host}."));
            }
            if let Some(port) = self.port {
                out.push(host_port(&format!("{host}."), port));
            }
        }
        match self.client_domain.find(".svc.") {
            Some(at) => self.kubernetes_forms(&mut out, host, at),
            None => self.shared_suffix_forms(&mut out, host),
        }
        out
    }

    /// In Kubernetes: `name` in the same namespace, `name.namespace` and `name.namespace.svc` everywhere.
    fn kubernetes_forms(&self, out: &mut Vec<String>, host: &str, namespace_end: usize) {
        let suffix = &self.client_domain[namespace_end..];
        let namespace = &self.client_domain[..namespace_end];
        if !host.ends_with(suffix) {
            return;
        }
        let Some(cut) = host.find(".svc.").filter(|at| *at > 0) else {
            return;
        };
        let Some(dot) = host.find('.').filter(|dot| *dot < cut) else {
            return;
        };
        let with_namespace = &host[..cut];
        if &host[dot + 1..cut] == namespace {
            self.push(out, &host[..dot]);
            self.push(out, &format!("{with_namespace}.svc"));
            self.push(out, with_namespace);
        } else {
            self.push(out, with_namespace);
            self.push(out, &format!("{with_namespace}.svc"));
        }
    }

    /// Elsewhere: the host without the labels that it shares with the client's domain at the end.
    fn shared_suffix_forms(&self, out: &mut Vec<String>, host: &str) {
        let own: Vec<&str> = host.split('.').collect();
        let client: Vec<&str> = self.client_domain.split('.').collect();
        let shared = own
            .iter()
            .rev()
            .zip(client.iter().rev())
            .take_while(|(a, b)| a == b)
            .count();
        if shared == 0 {
            return;
        }
        let unique = &own[..own.len() - shared];
        self.push(out, &unique.join("."));
        if unique.len() == 2 {
            self.push(out, &format!("{}.{}", unique.join("."), own[unique.len()]));
        }
    }

    fn push(&self, out: &mut Vec<String>, name: &str) {
        out.push(bracketed(name));
        if let Some(port) = self.port {
            out.push(host_port(name, port));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains(client: &str, port: Option<u32>, host: &str) -> Vec<String> {
        let style = Style {
            client_domain: client,
            port,
            absolute: true,
        };
        style.service([host], false, ["10.0.0.1"]).all
    }

    #[test]
    fn short_names_depend_on_the_clients_namespace() {
        let host = "a.ns1.svc.cluster.local";
        assert_eq!(
            domains("ns1.svc.cluster.local", None, host),
            [
                host,
                "a.ns1.svc.cluster.local.",
                "a",
                "a.ns1.svc",
                "a.ns1",
                "10.0.0.1"
            ]
        );
        assert_eq!(
            domains("ns2.svc.cluster.local", None, host),
            [
                host,
                "a.ns1.svc.cluster.local.",
                "a.ns1",
                "a.ns1.svc",
                "10.0.0.1"
            ]
        );
        assert_eq!(
            domains("ns2.svc.cluster.local", None, "api.partner.com"),
            ["api.partner.com", "api.partner.com.", "10.0.0.1"]
        );
    }

    #[test]
    fn a_port_stands_beside_each_name() {
        assert_eq!(
            domains("x.svc.cluster.local", Some(80), "api.com"),
            [
                "api.com",
                "api.com:80",
                "api.com.",
                "api.com.:80",
                "10.0.0.1",
                "10.0.0.1:80"
            ]
        );
    }

    #[test]
    fn outside_kubernetes_the_shared_suffix_goes() {
        let style = Style {
            client_domain: "local.campus.net",
            port: None,
            absolute: false,
        };
        assert_eq!(style.derived("foo.local.campus.net"), ["foo"]);
        assert_eq!(
            style.derived("foo.other.campus.net"),
            ["foo.other", "foo.other.campus"]
        );
        assert!(style.derived("foo.example.com").is_empty());
    }
}
