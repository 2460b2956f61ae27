"""The proxies that the bytes are sent to, each configured as strictly as its own words allow."""
import contextlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
EXT = "type.googleapis.com/envoy.extensions."


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def typed(name, kind, **fields):
    return {"name": name, "typed_config": {"@type": EXT + kind, **fields}}


def address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


# Case 32–35: what a policy refuses, by path and by a header that may come twice.
DENY = {"action": "DENY", "policies": {
    "admin": {"principals": [{"any": True}], "permissions": [{"or_rules": {"rules": [
        {"url_path": {"path": {"prefix": "/admin", "ignore_case": True}}},
        {"url_path": {"path": {"exact": "/user/profile"}}}]}}]},
    "role": {"principals": [{"any": True}], "permissions": [
        {"header": {"name": "x-role", "string_match": {"contains": "root"}}}]}}}


def manager(name, cluster, log, **more):
    """An HTTP connection manager with the hardening that Envoy's documentation asks for at an edge."""
    fields = {
        "stat_prefix": name, "codec_type": "AUTO", "use_remote_address": True, "normalize_path": True,
        "merge_slashes": True, "path_with_escaped_slashes_action": "REJECT_REQUEST", "strip_any_host_port": True,
        "strip_trailing_host_dot": True, "request_headers_timeout": "1s", "stream_idle_timeout": "2s",
        "common_http_protocol_options": {"idle_timeout": "4s", "headers_with_underscores_action": "REJECT_REQUEST",
                                         "max_headers_count": 100},
        "http_protocol_options": {"accept_http_10": True, "allow_absolute_url": True},
        "http2_protocol_options": {"max_concurrent_streams": 100, "initial_stream_window_size": 65536,
                                   "initial_connection_window_size": 1048576},
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "access_log": [typed("envoy.access_loggers.file", "access_loggers.file.v3.FileAccessLog", path=str(log),
                             log_format={"json_format": {
                                 "path": "%REQ(:PATH)%", "agent": "%REQ(USER-AGENT)%", "status": "%RESPONSE_CODE%",
                                 "sni": "%REQUESTED_SERVER_NAME%", "flags": "%RESPONSE_FLAGS%",
                                 "details": "%RESPONSE_CODE_DETAILS%", "host": "%UPSTREAM_HOST%",
                                 "route": "%ROUTE_NAME%"}})],
        "route_config": {"name": name, "virtual_hosts": [
            {"name": "secret", "domains": ["secret.com"],
             "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 403}}]},
            {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {
                "cluster": cluster, "timeout": "3s", "retry_policy": {"retry_on": "reset-before-request"}}}]}]},
        "http_filters": [typed("envoy.filters.http.rbac", "filters.http.rbac.v3.RBAC", rules=DENY),
                         typed("envoy.filters.http.router", "filters.http.router.v3.Router")],
        **more}
    return typed("envoy.filters.network.http_connection_manager",
                 "filters.network.http_connection_manager.v3.HttpConnectionManager", **fields)


def v3(ports, origins, keys, log):
    """The bootstrap for us and for Envoy, byte for byte the same."""
    def cluster(name, port, http2=False):
        made = {"name": name, "type": "STATIC", "connect_timeout": "1s", "load_assignment": {
            "cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(port)}}]}]}}
        if http2:
            made["typed_extension_protocol_options"] = {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": EXT + "upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {}}}}
        return made

    tls = {"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": EXT + "transport_sockets.tls.v3.DownstreamTlsContext", "require_client_certificate": True,
        "common_tls_context": {
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_certificates": [{"certificate_chain": {"filename": f"{keys}/server.pem"},
                                  "private_key": {"filename": f"{keys}/server.key"}}],
            "validation_context": {
                "trusted_ca": {"filename": f"{keys}/ca.pem"},
                "match_typed_subject_alt_names": [
                    {"san_type": "URI", "matcher": {"exact": "spiffe://cluster.local/ns/a/sa/b"}}]}}}}
    tcp = typed("envoy.filters.network.tcp_proxy", "filters.network.tcp_proxy.v3.TcpProxy",
                stat_prefix="tcp", cluster="origin", idle_timeout="3s")
    listeners = [
        {"name": "http", "filter_chains": [{"filters": [manager("http", "origin", log)]}]},
        {"name": "h2up", "filter_chains": [{"filters": [manager("h2up", "http2", log)]}]},
        {"name": "tls", "listener_filters": [
            typed("envoy.filters.listener.tls_inspector", "filters.listener.tls_inspector.v3.TlsInspector")],
         "listener_filters_timeout": "1s",
         "filter_chains": [{"filters": [manager("tls", "origin", log)], "transport_socket": tls}]},
        {"name": "proxied", "listener_filters": [
            typed("envoy.filters.listener.proxy_protocol", "filters.listener.proxy_protocol.v3.ProxyProtocol")],
         "listener_filters_timeout": "1s",
         "filter_chains": [{"filters": [manager("proxied", "origin", log)]}]},
        {"name": "tcp", "filter_chains": [{"filters": [tcp]}]},
    ]
    for listener in listeners:
        listener["address"] = address(ports[listener["name"]])
        listener["per_connection_buffer_limit_bytes"] = 32768
    return {"node": {"id": "hostile", "cluster": "hostile"}, "admin": {"address": address(ports["admin"])},
            "static_resources": {"listeners": listeners, "clusters": [
                cluster("origin", origins["http"]), cluster("http2", origins["h2"], True)]}}


HAPROXY = """
global
    nbthread 1
    log /dev/null local0
defaults
    mode http
    timeout connect 1s
    timeout client 3s
    timeout server 3s
    timeout http-request 1s
    timeout tunnel 3s
    option http-buffer-request
frontend all
    bind 127.0.0.1:{http}
    http-request deny if {{ path_beg -i /admin }} or {{ path /user/profile }}
    http-request deny if {{ hdr(host),lower,field(1,:) secret.com }}
    http-request deny if {{ req.hdr(x-role) -m sub root }}
    default_backend origin
backend origin
    server one 127.0.0.1:{origin}
"""

NGINX = """
daemon off; worker_processes 1; pid {home}/nginx.pid; error_log {home}/error.log;
events {{ worker_connections 1000; }}
http {{
    access_log off; client_header_timeout 1s; client_body_timeout 2s; send_timeout 2s; keepalive_timeout 4s;
    proxy_temp_path {home}/p; client_body_temp_path {home}/b; fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u;
    scgi_temp_path {home}/s; proxy_read_timeout 3s; proxy_next_upstream error;
    upstream origin {{ server 127.0.0.1:{origin}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{http}; server_name secret.com; return 403;
    }}
    server {{
        listen 127.0.0.1:{http} default_server;
        location ~* ^/admin {{ return 403; }}
        location = /user/profile {{ return 403; }}
        location / {{
            if ($http_x_role ~ root) {{ return 403; }}
            proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
        }}
    }}
}}
"""


class Proxy:
    """A running proxy: the ports of its listeners by name, and its process."""

    def __init__(self, name, ports, process=None, log=None, output=None):
        self.name, self.ports, self.process, self.log, self.output = name, ports, process, log, output

    def address(self, listener="http"):
        return ("127.0.0.1", self.ports[listener])

    def alive(self):
        return self.process is None or self.process.poll() is None

    def memory(self):
        """Resident memory in kB, without the pages of the program's file, which come in as its code is first used."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(l.split()[1]) for l in status if l.startswith("RssAnon"))

    def cpu(self):
        """Seconds of processor time so far."""
        with open(f"/proc/{self.process.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def program(name):
    """Where a proxy's program is, or None."""
    if name == "outrigger":
        return os.environ.get("OUTRIGGER_PROXY_BIN", str(TOP / "target/release/outrigger-proxy"))
    if name == "envoy":
        found = [*TOP.glob("target/*/envoy/_bin/envoy")]
        return str(found[0]) if found else shutil.which("envoy")
    return shutil.which(name) or shutil.which(name, path="/usr/sbin")


@contextlib.contextmanager
def started(name, home, origins, keys, ports=None, log=None, edit=None, limits=None):
    """Starts the proxy NAME with its configuration in HOME and ends it.

    PORTS are those of its listeners, LOG the file of its access log; EDIT changes its bootstrap; LIMITS are of the process.
    """
    binary = program(name)
    if not binary or not os.path.exists(binary):
        sys.exit(f"{name}: no such program on this machine ({binary or 'not in PATH'})")
    home.mkdir()
    log = log or home / "access.log"
    if name in ("outrigger", "envoy"):
        ports = ports or {n: free_port() for n in ("http", "h2up", "tls", "proxied", "tcp", "admin")}
        file = home / "config.json"
        config = v3(ports, origins, keys, log)
        file.write_text(json.dumps(edit(config) if edit else config, indent=1))
        command = [binary, "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "-l", "error",
                   "--file-flush-interval-msec", "50"]
        if name == "outrigger":
            command.insert(1, "proxy")
    else:
        ports = ports or {"http": free_port()}
        file = home / f"{name}.conf"
        text = HAPROXY if name == "haproxy" else NGINX
        file.write_text(text.format(home=home, origin=origins["http"], **ports))
        command = [binary, "-f", str(file)] if name == "haproxy" else [binary, "-c", str(file)]
    output = home / "output"

    def limit():
        for what, most in (limits or {}).items():
            resource.setrlimit(what, (most, most))

    with open(output, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=limit)
    try:
        proxy = Proxy(name, ports, process, log, output)
        wait(proxy)
        number = itertools.count()
        proxy.again = lambda **more: started(name, home / f"again-{next(number)}", origins, keys, **more)
        yield proxy
    finally:
        # At once: some would let clients finish first after SIGTERM.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait(proxy):
    """Until all ports answer."""
    for port in proxy.ports.values():
        end = time.monotonic() + 60
        while True:
            if not proxy.alive() or time.monotonic() > end:
                sys.exit(f"{proxy.name} does not serve:\n{proxy.output.read_text(errors='replace')[-2000:]}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.01)
