//! Ports and the protocol that Istio selects for them.

/// What a port speaks, as far as its name, `appProtocol` or object says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Grpc,
    GrpcWeb,
    Http,
    HttpProxy,
    Http2,
    Https,
    Tls,
    Mongo,
    Redis,
    MySql,
    /// Nothing said: HTTP is told from the bytes.
    Unsupported,
}

impl Protocol {
    /// Reads a protocol's name, in any case; an unknown name is [`Protocol::Unsupported`].
    pub fn parse(name: &str) -> Self {
        match name.to_ascii_lowercase().as_str() {
            "tcp" => Self::Tcp,
            "udp" => Self::Udp,
            "grpc" => Self::Grpc,
            "grpc-web" => Self::GrpcWeb,
            "http" => Self::Http,
            "http_proxy" => Self::HttpProxy,
            "http2" => Self::Http2,
            "https" => Self::Https,
            "tls" => Self::Tls,
            "mongo" => Self::Mongo,
            "redis" => Self::Redis,
            "mysql" => Self::MySql,
            _ => Self::Unsupported,
        }
    }

    /// The protocol of a Kubernetes Service's port: UDP stays UDP, then `appProtocol`, then the prefix of the
    /// name, then a few well-known numbers whose server speaks first.
    pub fn of_kubernetes(
        number: u32,
        name: &str,
        transport: &str,
        app_protocol: Option<&str>,
    ) -> Self {
        if transport == "UDP" {
            return Self::Udp;
        }
        let mut name = name;
        if let Some(app) = app_protocol {
            match app {
                "kubernetes.io/h2c" => return Self::Http2,
                "kubernetes.io/ws" => return Self::Http,
                "kubernetes.io/wss" => return Self::Https,
                _ => name = app,
            }
        }
        if name
            .get(..8)
            .is_some_and(|p| p.eq_ignore_ascii_case("grpc-web"))
        {
            return Self::GrpcWeb;
        }
        let prefix = name.split_once('-').map_or(name, |(prefix, _)| prefix);
        match Self::parse(prefix) {
            Self::Unsupported if matches!(number, 25 | 53 | 3306 | 27017) => Self::Tcp,
            protocol => protocol,
        }
    }

    /// HTTP in any version.
    pub fn is_http(self) -> bool {
        matches!(
            self,
            Self::Http | Self::Http2 | Self::HttpProxy | Self::Grpc | Self::GrpcWeb
        )
    }

    /// HTTP/2 on the wire.
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// gRPC or gRPC-Web.
    pub fn is_grpc(self) -> bool {
        matches!(self, Self::Grpc | Self::GrpcWeb)
    }

    /// A protocol that is handled as bytes.
    pub fn is_tcp(self) -> bool {
        matches!(
            self,
            Self::Tcp | Self::Https | Self::Tls | Self::Mongo | Self::Redis | Self::MySql
        )
    }

    /// TLS by the application itself.
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }

    /// Nothing is known: the proxy looks at the bytes.
    pub fn is_unsupported(self) -> bool {
        self == Self::Unsupported
    }

    /// HTTP, or perhaps HTTP.
    pub fn is_http_or_sniffed(self) -> bool {
        self.is_http() || self.is_unsupported()
    }

    /// What is left once TLS is taken off.
    pub fn after_tls(self) -> Self {
        match self {
            Self::Https => Self::Http,
            Self::Tls => Self::Tcp,
            other => other,
        }
    }

    /// Istio's name of the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Grpc => "GRPC",
            Self::GrpcWeb => "GRPC-Web",
            Self::Http => "HTTP",
            Self::HttpProxy => "HTTP_PROXY",
            Self::Http2 => "HTTP2",
            Self::Https => "HTTPS",
            Self::Tls => "TLS",
            Self::Mongo => "Mongo",
            Self::Redis => "Redis",
            Self::MySql => "MySQL",
            Self::Unsupported => "UnsupportedProtocol",
        }
    }
}

/// Where a Service's port leads in the pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TargetPort {
    /// The number itself (also where nothing is said: the port's own number).
    Number(u32),
    /// The name of a container's port.
    Name(String),
}

/// One port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Port {
    pub name: String,
    /// The service's port number.
    pub number: u32,
    pub protocol: Protocol,
    /// Where it leads in the workload.
    pub target: TargetPort,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_of_a_service_port() {
        let of = Protocol::of_kubernetes;
        assert_eq!(of(80, "http-web", "TCP", None), Protocol::Http);
        assert_eq!(of(80, "grpc-web-x", "TCP", None), Protocol::GrpcWeb);
        assert_eq!(of(80, "web", "TCP", None), Protocol::Unsupported);
        assert_eq!(of(3306, "db", "TCP", None), Protocol::Tcp);
        assert_eq!(of(80, "http", "UDP", None), Protocol::Udp);
        assert_eq!(of(443, "tls", "TCP", Some("https")), Protocol::Https);
        assert_eq!(
            of(443, "http", "TCP", Some("kubernetes.io/wss")),
            Protocol::Https
        );
        assert_eq!(of(80, "http", "TCP", Some("acme")), Protocol::Unsupported);
    }
}
