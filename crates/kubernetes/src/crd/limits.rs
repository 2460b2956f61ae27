//! The limits and rules of Istio's definitions, by message and field; messages without `istio.` before them.

use super::rules::Limit::{self, *};

pub(super) const DURATION: Limit = Rule(
    "duration(self) >= duration('1ms')",
    "must be a valid duration greater than 1ms",
);
const PORT: Limit = Rule("0 < self && self <= 65535", "port must be between 1-65535");
const ONE_TARGET: Limit = Rule(
    "(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1",
    "only one of targetRefs or selector can be set",
);
const NO_WILDCARD: Limit = Rule(
    "!self.contains('*')",
    "wildcard is not supported in selector",
);
const SOCKET_WITHOUT_PORTS: (&str, &str) = (
    "!(has(self.address) && self.address.startsWith('unix://') && has(self.ports))",
    "UDS may not include ports",
);
const WASM_URL: Limit = Rule(
    "(isURL(self) ? url(self).getScheme() : isURL('http://' + self) ? '' : 'none') in ['', 'http', 'https', 'file', 'oci']",
    "url must have schema one of [http, https, file, oci]",
);
const HTTP_URL: Limit = Rule(
    "url(self).getScheme() in ['http', 'https']",
    "url must have scheme http:// or https://",
);
const HEADER: Limit = Matches("^[-_A-Za-z0-9]+$");
const SHA256: Limit = Matches("(^$|^[a-f0-9]{64}$)");

/// Fields that must be there.
pub(super) const REQUIRED: &[(&str, &[&str])] = &[
    ("extensions.v1alpha1.EnvVar", &["name"]),
    ("extensions.v1alpha1.LuaConfig", &["inlineCode"]),
    ("extensions.v1alpha1.WasmConfig", &["url"]),
    ("extensions.v1alpha1.WasmPlugin", &["url"]),
    ("networking.v1alpha3.Destination", &["host"]),
    ("networking.v1alpha3.DestinationRule", &["host"]),
    ("networking.v1alpha3.ExecHealthCheckConfig", &["command"]),
    ("networking.v1alpha3.HTTPDirectResponse", &["status"]),
    ("networking.v1alpha3.HTTPHealthCheckConfig", &["port"]),
    ("networking.v1alpha3.HTTPMirrorPolicy", &["destination"]),
    ("networking.v1alpha3.HTTPRouteDestination", &["destination"]),
    ("networking.v1alpha3.IstioEgressListener", &["hosts"]),
    ("networking.v1alpha3.IstioIngressListener", &["port"]),
    (
        "networking.v1alpha3.LoadBalancerSettings.ConsistentHashLB.HTTPCookie",
        &["name"],
    ),
    (
        "networking.v1alpha3.LoadBalancerSettings.ConsistentHashLB.HTTPCookie.Attribute",
        &["name"],
    ),
    ("networking.v1alpha3.Port", &["number", "protocol", "name"]),
    ("networking.v1alpha3.RouteDestination", &["destination"]),
    ("networking.v1alpha3.Server", &["port", "hosts"]),
    ("networking.v1alpha3.ServiceEntry", &["hosts"]),
    ("networking.v1alpha3.ServicePort", &["number", "name"]),
    ("networking.v1alpha3.Subset", &["name"]),
    ("networking.v1alpha3.TCPHealthCheckConfig", &["port"]),
    ("networking.v1alpha3.TLSMatchAttributes", &["sniHosts"]),
    ("networking.v1alpha3.TLSRoute", &["match"]),
    (
        "networking.v1alpha3.TrafficPolicy.TunnelSettings",
        &["targetHost", "targetPort"],
    ),
    ("networking.v1alpha3.WarmupConfiguration", &["duration"]),
    ("networking.v1alpha3.WorkloadGroup", &["template"]),
    ("security.v1beta1.ClaimToHeader", &["header", "claim"]),
    ("security.v1beta1.Condition", &["key"]),
    ("security.v1beta1.JWTHeader", &["name"]),
    ("telemetry.v1alpha1.ProviderRef", &["name"]),
    ("telemetry.v1alpha1.Tracing.Environment", &["name"]),
    ("telemetry.v1alpha1.Tracing.Formatter", &["value"]),
    ("telemetry.v1alpha1.Tracing.Literal", &["value"]),
    ("telemetry.v1alpha1.Tracing.RequestHeader", &["name"]),
    ("type.v1beta1.PolicyTargetReference", &["kind", "name"]),
    ("type.v1beta1.PortSelector", &["number"]),
];

/// Rules between the fields of a message.
pub(super) const BETWEEN: &[(&str, &[Limit])] = &[
    (
        "extensions.v1alpha1.EnvVar",
        &[Rule(
            "!(has(self.value) && has(self.valueFrom) && self.valueFrom == 'HOST')",
            "value may only be set when valueFrom is INLINE",
        )],
    ),
    (
        "extensions.v1alpha1.TrafficExtension",
        &[
            Rule(
                "!(has(self.selector) && has(self.targetRefs))",
                "only one of targetRefs or selector can be set",
            ),
            Rule(
                "has(self.wasm) != has(self.lua)",
                "exactly one of wasm or lua must be set",
            ),
        ],
    ),
    ("extensions.v1alpha1.WasmPlugin", &[ONE_TARGET]),
    (
        "networking.v1alpha3.EnvoyFilter",
        &[Rule(
            "!(has(self.workloadSelector) && has(self.targetRefs))",
            "only one of targetRefs or workloadSelector can be set",
        )],
    ),
    (
        "networking.v1alpha3.EnvoyFilter.EnvoyConfigObjectMatch",
        &[Rule(
            "(has(self.context) && self.context == 'WAYPOINT') == has(self.waypoint)",
            "only support waypointMatch when context is WAYPOINT",
        )],
    ),
    (
        "networking.v1alpha3.ServerTLSSettings",
        &[
            Rule(
                "!(has(self.tlsCertificates) && has(self.credentialNames))",
                "only one of credentialNames or tlsCertificates can be set",
            ),
            Rule(
                "!(has(self.credentialName) && has(self.credentialNames))",
                "only one of credentialName or credentialNames can be set",
            ),
        ],
    ),
    (
        "networking.v1alpha3.ServiceEntry",
        &[
            Rule(
                "!(has(self.workloadSelector) && has(self.endpoints))",
                "only one of WorkloadSelector or Endpoints can be set",
            ),
            Rule(
                "!has(self.resolution) || self.resolution in ['NONE', 'STATIC'] || !has(self.addresses) || \
                 !self.addresses.exists(a, a.contains('/'))",
                "CIDR addresses are allowed only for NONE/STATIC resolution types",
            ),
            Rule(
                "(has(self.resolution) && self.resolution != 'NONE') || !has(self.endpoints)",
                "NONE mode cannot set endpoints",
            ),
            Rule(
                "!has(self.resolution) || self.resolution != 'DNS_ROUND_ROBIN' || !has(self.endpoints) || \
                 self.endpoints.size() <= 1",
                "DNS_ROUND_ROBIN mode cannot have multiple endpoints",
            ),
        ],
    ),
    (
        "networking.v1alpha3.WorkloadEntry",
        &[
            Rule(
                "has(self.address) || has(self.network)",
                "Address is required",
            ),
            Rule(SOCKET_WITHOUT_PORTS.0, SOCKET_WITHOUT_PORTS.1),
        ],
    ),
    ("security.v1beta1.AuthorizationPolicy", &[ONE_TARGET]),
    (
        "security.v1beta1.JWTRule",
        &[Rule(
            "(has(self.jwksUri) ? 1 : 0) + (has(self.jwks_uri) ? 1 : 0) + (has(self.jwks) ? 1 : 0) <= 1",
            "only one of jwks or jwksUri can be set",
        )],
    ),
    (
        "security.v1beta1.PeerAuthentication",
        &[Rule(
            "!has(self.portLevelMtls) || (has(self.selector) && has(self.selector.matchLabels) && \
             self.selector.matchLabels.size() > 0)",
            "portLevelMtls requires selector",
        )],
    ),
    ("security.v1beta1.RequestAuthentication", &[ONE_TARGET]),
    (
        "security.v1beta1.Source",
        &[Rule(
            "!(has(self.serviceAccounts) || has(self.notServiceAccounts)) || !(has(self.principals) || \
             has(self.notPrincipals) || has(self.namespaces) || has(self.notNamespaces))",
            "Cannot set serviceAccounts with namespaces or principals",
        )],
    ),
    ("telemetry.v1alpha1.Telemetry", &[ONE_TARGET]),
    (
        "telemetry.v1alpha1.MetricsOverrides.TagOverride",
        &[
            Rule(
                "!has(self.operation) || self.operation != 'UPSERT' || self.value != ''",
                "value must be set when operation is UPSERT",
            ),
            Rule(
                "!has(self.operation) || self.operation != 'REMOVE' || !has(self.value)",
                "value must not be set when operation is REMOVE",
            ),
        ],
    ),
];

/// Message and field, with `[]` behind it the elements of a list or the values of a map.
pub(super) const FIELDS: &[(&str, &str, &[Limit])] = &[
    ("extensions.v1alpha1.EnvVar", "name", &[Length(1, 256)]),
    ("extensions.v1alpha1.EnvVar", "value", &[Length(0, 2048)]),
    (
        "extensions.v1alpha1.LuaConfig",
        "inlineCode",
        &[Length(1, 65536)],
    ),
    (
        "extensions.v1alpha1.TrafficExtension",
        "targetRefs",
        &[Items(0, 16)],
    ),
    (
        "extensions.v1alpha1.TrafficSelector",
        "ports",
        &[Keyed("number")],
    ),
    (
        "extensions.v1alpha1.VmConfig",
        "env",
        &[Items(0, 256), Keyed("name")],
    ),
    (
        "extensions.v1alpha1.WasmConfig",
        "imagePullSecret",
        &[Length(1, 253)],
    ),
    (
        "extensions.v1alpha1.WasmConfig",
        "pluginName",
        &[Length(1, 256)],
    ),
    ("extensions.v1alpha1.WasmConfig", "sha256", &[SHA256]),
    (
        "extensions.v1alpha1.WasmConfig",
        "url",
        &[Length(1, 0), WASM_URL],
    ),
    (
        "extensions.v1alpha1.WasmPlugin",
        "imagePullSecret",
        &[Length(1, 253)],
    ),
    (
        "extensions.v1alpha1.WasmPlugin",
        "pluginName",
        &[Length(1, 256)],
    ),
    ("extensions.v1alpha1.WasmPlugin", "sha256", &[SHA256]),
    (
        "extensions.v1alpha1.WasmPlugin",
        "targetRefs",
        &[Items(0, 16)],
    ),
    (
        "extensions.v1alpha1.WasmPlugin",
        "url",
        &[Length(1, 0), WASM_URL],
    ),
    (
        "extensions.v1alpha1.WasmPlugin.TrafficSelector",
        "ports",
        &[Keyed("number")],
    ),
    (
        "networking.v1alpha3.EnvoyFilter",
        "targetRefs",
        &[Items(0, 16)],
    ),
    (
        "networking.v1alpha3.EnvoyFilter.WaypointMatch",
        "portNumber",
        &[PORT],
    ),
    (
        "networking.v1alpha3.ExecHealthCheckConfig",
        "command[]",
        &[Length(1, 0)],
    ),
    ("networking.v1alpha3.GrpcHealthCheckConfig", "port", &[PORT]),
    ("networking.v1alpha3.HTTPHeader", "name", &[HEADER]),
    ("networking.v1alpha3.HTTPHealthCheckConfig", "port", &[PORT]),
    (
        "networking.v1alpha3.HTTPHealthCheckConfig",
        "scheme",
        &[Rule(
            "self in ['', 'HTTP', 'HTTPS']",
            "scheme must be one of [HTTP, HTTPS]",
        )],
    ),
    (
        "networking.v1alpha3.OutlierDetection",
        "outlierDetectionHttpErrorCodes[]",
        &[From(100), To(599)],
    ),
    (
        "networking.v1alpha3.ReadinessProbe",
        "failureThreshold",
        &[From(0)],
    ),
    (
        "networking.v1alpha3.ReadinessProbe",
        "initialDelaySeconds",
        &[From(0)],
    ),
    (
        "networking.v1alpha3.ReadinessProbe",
        "periodSeconds",
        &[From(0)],
    ),
    (
        "networking.v1alpha3.ReadinessProbe",
        "successThreshold",
        &[From(0)],
    ),
    (
        "networking.v1alpha3.ReadinessProbe",
        "timeoutSeconds",
        &[From(0)],
    ),
    (
        "networking.v1alpha3.ServerTLSSettings",
        "credentialNames",
        &[Items(1, 2)],
    ),
    (
        "networking.v1alpha3.ServerTLSSettings",
        "tlsCertificates",
        &[Items(1, 2)],
    ),
    (
        "networking.v1alpha3.ServiceEntry",
        "addresses",
        &[Items(0, 256)],
    ),
    (
        "networking.v1alpha3.ServiceEntry",
        "addresses[]",
        &[Length(0, 64)],
    ),
    (
        "networking.v1alpha3.ServiceEntry",
        "endpoints",
        &[Items(0, 4096)],
    ),
    (
        "networking.v1alpha3.ServiceEntry",
        "hosts",
        &[Items(1, 256)],
    ),
    (
        "networking.v1alpha3.ServiceEntry",
        "hosts[]",
        &[Rule("self != '*'", "hostname cannot be wildcard")],
    ),
    (
        "networking.v1alpha3.ServiceEntry",
        "ports",
        &[
            Items(0, 256),
            Keyed("name"),
            Rule(
                "self.all(a, self.exists_one(b, a.number == b.number))",
                "port number cannot be duplicated",
            ),
        ],
    ),
    ("networking.v1alpha3.ServicePort", "name", &[Length(0, 256)]),
    ("networking.v1alpha3.ServicePort", "number", &[PORT]),
    (
        "networking.v1alpha3.ServicePort",
        "protocol",
        &[Length(0, 256)],
    ),
    ("networking.v1alpha3.ServicePort", "targetPort", &[PORT]),
    ("networking.v1alpha3.TCPHealthCheckConfig", "port", &[PORT]),
    (
        "networking.v1alpha3.TrafficPolicy",
        "portLevelSettings",
        &[Items(0, 4096)],
    ),
    (
        "networking.v1alpha3.TrafficPolicy.RetryBudget",
        "percent",
        &[From(0), To(100)],
    ),
    (
        "networking.v1alpha3.WarmupConfiguration",
        "aggression",
        &[From(0)],
    ),
    (
        "networking.v1alpha3.WarmupConfiguration",
        "minimumPercent",
        &[From(0), To(100)],
    ),
    (
        "networking.v1alpha3.WorkloadEntry",
        "address",
        &[
            Length(0, 256),
            Rule(
                "!self.startsWith('unix://') || self.startsWith('unix:///') || self.startsWith('unix://@')",
                "UDS must be an absolute path or abstract socket",
            ),
            Rule(
                "!(self.startsWith('unix://') && self.endsWith('/'))",
                "UDS may not be a dir",
            ),
        ],
    ),
    (
        "networking.v1alpha3.WorkloadEntry",
        "labels",
        &[Entries(0, 256)],
    ),
    (
        "networking.v1alpha3.WorkloadEntry",
        "locality",
        &[Length(0, 2048)],
    ),
    (
        "networking.v1alpha3.WorkloadEntry",
        "network",
        &[Length(0, 2048)],
    ),
    (
        "networking.v1alpha3.WorkloadEntry",
        "ports",
        &[
            Entries(0, 128),
            Rule(
                "self.all(name, name.matches('^[a-zA-Z0-9]([-a-zA-Z0-9]{0,60}[a-zA-Z0-9])?$'))",
                "port name must be valid",
            ),
        ],
    ),
    ("networking.v1alpha3.WorkloadEntry", "ports[]", &[PORT]),
    (
        "networking.v1alpha3.WorkloadEntry",
        "serviceAccount",
        &[Length(0, 253)],
    ),
    (
        "networking.v1alpha3.WorkloadGroup.ObjectMeta",
        "annotations",
        &[Entries(0, 256)],
    ),
    (
        "networking.v1alpha3.WorkloadGroup.ObjectMeta",
        "labels",
        &[Entries(0, 256)],
    ),
    (
        "networking.v1alpha3.WorkloadSelector",
        "labels",
        &[Entries(0, 256)],
    ),
    (
        "networking.v1alpha3.WorkloadSelector",
        "labels[]",
        &[Length(0, 63), NO_WILDCARD],
    ),
    (
        "networking.v1alpha3.ZoneAwareLoadBalancerSetting",
        "minClusterSize",
        &[From(1)],
    ),
    ("networking.v1beta1.ProxyConfig", "concurrency", &[From(0)]),
    (
        "networking.v1beta1.ProxyConfig",
        "environmentVariables[]",
        &[Length(0, 2048)],
    ),
    (
        "security.v1beta1.AuthorizationPolicy",
        "rules",
        &[Items(0, 512)],
    ),
    (
        "security.v1beta1.AuthorizationPolicy",
        "targetRefs",
        &[Items(0, 16)],
    ),
    ("security.v1beta1.ClaimToHeader", "claim", &[Length(1, 0)]),
    (
        "security.v1beta1.ClaimToHeader",
        "header",
        &[Length(1, 0), HEADER],
    ),
    ("security.v1beta1.JWTHeader", "name", &[Length(1, 0)]),
    ("security.v1beta1.JWTRule", "audiences[]", &[Length(1, 0)]),
    ("security.v1beta1.JWTRule", "fromCookies[]", &[Length(1, 0)]),
    ("security.v1beta1.JWTRule", "fromParams[]", &[Length(1, 0)]),
    ("security.v1beta1.JWTRule", "issuer", &[Length(1, 0)]),
    (
        "security.v1beta1.JWTRule",
        "jwksUri",
        &[Length(1, 2048), HTTP_URL],
    ),
    (
        "security.v1beta1.JWTRule",
        "spaceDelimitedClaims",
        &[Items(0, 64)],
    ),
    (
        "security.v1beta1.JWTRule",
        "spaceDelimitedClaims[]",
        &[Length(1, 0)],
    ),
    (
        "security.v1beta1.PeerAuthentication",
        "portLevelMtls",
        &[
            Entries(1, 0),
            Rule(
                "self.all(port, 0 < int(port) && int(port) <= 65535)",
                "port must be between 1-65535",
            ),
        ],
    ),
    (
        "security.v1beta1.RequestAuthentication",
        "jwtRules",
        &[Items(0, 4096)],
    ),
    (
        "security.v1beta1.RequestAuthentication",
        "targetRefs",
        &[Items(0, 16)],
    ),
    ("security.v1beta1.Rule", "from", &[Items(0, 512)]),
    (
        "security.v1beta1.Source",
        "notServiceAccounts",
        &[Items(0, 16)],
    ),
    (
        "security.v1beta1.Source",
        "notServiceAccounts[]",
        &[Length(0, 320)],
    ),
    (
        "security.v1beta1.Source",
        "serviceAccounts",
        &[Items(0, 16)],
    ),
    (
        "security.v1beta1.Source",
        "serviceAccounts[]",
        &[Length(0, 320)],
    ),
    (
        "telemetry.v1alpha1.MetricSelector",
        "customMetric",
        &[Length(1, 0)],
    ),
    ("telemetry.v1alpha1.ProviderRef", "name", &[Length(1, 0)]),
    (
        "telemetry.v1alpha1.Telemetry",
        "targetRefs",
        &[Items(0, 16)],
    ),
    (
        "telemetry.v1alpha1.Tracing",
        "randomSamplingPercentage",
        &[From(0), To(100)],
    ),
    (
        "telemetry.v1alpha1.Tracing.Environment",
        "name",
        &[Length(1, 0)],
    ),
    (
        "telemetry.v1alpha1.Tracing.Formatter",
        "value",
        &[Length(1, 0)],
    ),
    (
        "telemetry.v1alpha1.Tracing.Literal",
        "value",
        &[Length(1, 0)],
    ),
    (
        "telemetry.v1alpha1.Tracing.RequestHeader",
        "name",
        &[Length(1, 0)],
    ),
    (
        "type.v1beta1.PolicyTargetReference",
        "group",
        &[
            Length(0, 253),
            Matches("^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"),
        ],
    ),
    (
        "type.v1beta1.PolicyTargetReference",
        "kind",
        &[
            Length(1, 63),
            Matches("^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"),
        ],
    ),
    (
        "type.v1beta1.PolicyTargetReference",
        "name",
        &[Length(1, 253)],
    ),
    (
        "type.v1beta1.PolicyTargetReference",
        "namespace",
        &[Rule(
            "self.size() == 0",
            "cross namespace referencing is not currently supported",
        )],
    ),
    ("type.v1beta1.PortSelector", "number", &[From(1), To(65535)]),
    (
        "type.v1beta1.WorkloadSelector",
        "matchLabels",
        &[
            Entries(0, 4096),
            Rule(
                "self.all(key, !key.contains('*'))",
                "wildcard not allowed in label key match",
            ),
            Rule("self.all(key, key.size() != 0)", "key must not be empty"),
        ],
    ),
    (
        "type.v1beta1.WorkloadSelector",
        "matchLabels[]",
        &[
            Length(0, 63),
            Rule(
                "!self.contains('*')",
                "wildcard not allowed in label value match",
            ),
        ],
    ),
    (
        "networking.v1alpha3.WorkloadGroup",
        "template",
        &[Instead(SOCKET_WITHOUT_PORTS.0, SOCKET_WITHOUT_PORTS.1)],
    ),
];
