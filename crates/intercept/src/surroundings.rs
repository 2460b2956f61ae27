//! What only the pod itself can tell: its addresses, its resolvers, its users, groups and services.

use std::{fs, net::IpAddr};

use nix::ifaddrs::getifaddrs;

use crate::Error;

/// The pod's addresses that can be captured, in the kernel's order.
#[derive(Clone, Debug, Default)]
pub struct Addresses(pub Vec<IpAddr>);

impl Addresses {
    /// The addresses of this network namespace without loopback and link-local ones.
    pub fn of_this_pod() -> Result<Addresses, Error> {
        let found = getifaddrs().map_err(|e| Error::Surroundings {
            what: "addresses of this network namespace".into(),
            why: e.to_string(),
        })?;
        let mut addresses = Vec::new();
        for entry in found {
            let Some(address) = entry.address else {
                continue;
            };
            let ip = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => IpAddr::V4(v4.ip()),
                (_, Some(v6)) => IpAddr::V6(v6.ip()).to_canonical(),
                _ => continue,
            };
            if !ip.is_loopback() && !link_local(ip) {
                addresses.push(ip);
            }
        }
        Ok(Addresses(addresses))
    }

    /// Whether IPv6 is captured. The first address decides, unless `any` is set (`--dual-stack`).
    pub fn ipv6(&self, any: bool) -> Result<bool, Error> {
        match self.0.first() {
            None => Err(Error::Surroundings {
                what: "no valid local IP address found".into(),
                why: "every interface but lo is without a global address; \
                      bring the pod's network up first"
                    .into(),
            }),
            Some(first) => Ok(first.is_ipv6() || any && self.0.iter().any(IpAddr::is_ipv6)),
        }
    }

    /// An IPv6 address whose traffic stays uncaptured although the pod has it.
    pub fn uncaptured_ipv6(&self, any: bool) -> Option<IpAddr> {
        match self.ipv6(any) {
            Ok(false) => self.0.iter().copied().find(IpAddr::is_ipv6),
            _ => None,
        }
    }

    /// The pod's address of one family.
    pub fn of_family(&self, v6: bool) -> Option<IpAddr> {
        self.0.iter().copied().find(|a| a.is_ipv6() == v6)
    }
}

fn link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_link_local() || a.octets()[..3] == [224, 0, 0],
        IpAddr::V6(a) => a.is_unicast_link_local() || a.segments()[0] & 0xff0f == 0xff02,
    }
}

/// The name servers of a resolv.conf, in order; a line that names no address is passed over.
pub fn resolvers(path: &str) -> Result<Vec<IpAddr>, Error> {
    let text = fs::read_to_string(path).map_err(|why| Error::File {
        path: path.into(),
        why,
    })?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next())?
        })
        .filter_map(|server| server.split('%').next()?.parse().ok())
        .collect())
}

/// The number of a user: by name from /etc/passwd.
pub fn user_id(name: &str) -> Option<String> {
    field("/etc/passwd", name, 2)
}

/// The number of a group: itself, or by name from /etc/group. Looked up in the file alone, never through NSS.
pub fn group_id(name: &str) -> Option<String> {
    if name.parse::<u32>().is_ok() {
        return Some(name.into());
    }
    field("/etc/group", name, 2)
}

/// The number of a port: itself, or by name from /etc/services, as iptables takes it.
pub fn port(name: &str, protocol: &str) -> Option<u16> {
    if let Ok(port) = name.parse() {
        return Some(port);
    }
    let services = fs::read_to_string("/etc/services").ok()?;
    services.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let first = words.next()?;
        let (port, proto) = words.next()?.split_once('/')?;
        (proto == protocol && (first == name || words.any(|alias| alias == name)))
            .then(|| port.parse().ok())?
    })
}

fn field(path: &str, name: &str, index: usize) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields[0] == name)?
        .get(index)
        .map(|id| id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_decides_unless_asked_otherwise() {
        let pod = |list: &[&str]| Addresses(list.iter().map(|a| a.parse().unwrap()).collect());
        let dual = pod(&["10.9.0.5", "2001:db8::5"]);
        assert!(!dual.ipv6(false).unwrap() && dual.ipv6(true).unwrap());
        assert_eq!(dual.uncaptured_ipv6(false), dual.of_family(true));
        assert_eq!(dual.uncaptured_ipv6(true), None);
        assert!(pod(&["2001:db8::5", "10.9.0.5"]).ipv6(false).unwrap());
        assert!(pod(&[]).ipv6(true).is_err());
    }

    #[test]
    fn resolvers_keep_their_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "# x\nnameserver fd00::53\nsearch a b\nnameserver\t10.0.0.2 \nnameserver bad\n";
        fs::write(file.path(), text).unwrap();
        let found = resolvers(file.path().to_str().unwrap()).unwrap();
        assert_eq!(
            found,
            [
                "fd00::53".parse::<IpAddr>().unwrap(),
                "10.0.0.2".parse().unwrap()
            ]
        );
        assert!(
            resolvers("/nonexistent")
                .unwrap_err()
                .to_string()
                .contains("/nonexistent")
        );
    }
}
