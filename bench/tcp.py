"""TCP scenarios of the bench: small messages, streams with and without splice(2), new connections, idle connections.

`cpu_per_request` is per request of wrk (tcp: 1 KiB; streams: 1 MiB) or per connection (conn-rate); `rss_per_connection` is
in bytes, over 10,000 connections that have each exchanged a few bytes and then rest. Peers: Envoy's and HAProxy's TCP
proxies, with the same worker, buffers of their own choice, no log.
"""
import contextlib
import json
import resource
import socket
import subprocess
import threading
import time

STREAM = 1 << 20
IDLE = 10_000
EXCHANGED = b"x" * 64


def v3_config(listen, admin, upstream, splice):
    kind = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
    address = lambda port: {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    unlimited = {"thresholds": [{"max_connections": 100_000}]}
    return {
        "admin": {"address": address(admin)},
        "layered_runtime": {"layers": [{"name": "bench", "static_layer": {"outrigger.tcp_proxy.splice": splice}}]},
        "static_resources": {
            "listeners": [{"name": "bench", "address": address(listen), "filter_chains": [{"filters": [
                {"name": "tcp", "typed_config": {"@type": kind, "stat_prefix": "bench", "cluster": "origin"}}]}]}],
            "clusters": [{"name": "origin", "type": "STATIC", "connect_timeout": "5s", "circuit_breakers": unlimited,
                          "load_assignment": {"cluster_name": "origin", "endpoints": [{"lb_endpoints": [
                              {"endpoint": {"address": address(upstream)}}]}]}}],
        },
    }


def scenarios(run):
    """The scenarios by name; `run` is the bench program."""

    class TcpPeer(run.Peer):
        def __init__(self, name, work, upstream, splice):
            self.name, self.port, self.admin = name, run.free_port(), run.free_port()
            config = work / f"{name}.conf"
            if name == "haproxy":
                option = "option splice-auto" if splice else ""
                # HAProxy does not start with more than its files allow: two for each connection, two for each pipe.
                most = min(40_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 2 - 200)
                config.write_text(f"""
global
  nbthread 1
  maxconn {most}
  maxpipes 64
defaults
  mode tcp
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  {option}
listen l
  bind 127.0.0.1:{self.port} backlog 20000
  server s 127.0.0.1:{upstream}
""")
                command = ["haproxy", "-f", str(config), "-db"]
            else:
                config = config.with_suffix(".json")
                config.write_text(json.dumps(v3_config(self.port, self.admin, upstream, splice)))
                ours = name == "outrigger"
                program = [str(run.RELEASE / "outrigger-proxy"), "proxy"] if ours else [run.envoy_binary()]
                command = program + ["-c", str(config), "--concurrency", "1", "--disable-hot-restart", "-l", "error",
                                     *([] if ours else ["--use-dynamic-base-id"])]
            self.process = subprocess.Popen(["taskset", "-c", run.PROXY_CORE, *command], stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL, start_new_session=True)
            self.await_port()

        def await_port(self):
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                    return
                time.sleep(0.01)
            raise SystemExit(f"{self.name} does not listen")

    def with_peers(work, upstream, splice):
        return [TcpPeer(name, work, upstream, splice) for name in ("outrigger", "envoy", "haproxy")]

    def through_wrk(connections, splice, size, close=False):
        def scenario(options, work):
            samples = {}
            (work / "body").write_bytes(b"x" * size)
            extra = ["-H", "Connection: close"] if close else []
            with file_origin(run, work) as upstream:
                peers = with_peers(work, upstream, splice)
                try:
                    for p in peers:
                        load(run, p.port, connections, 1, extra)
                    for _ in range(options.rounds):
                        for p in peers:
                            before = p.cpu()
                            result = load(run, p.port, connections, options.seconds, extra)
                            result["cpu_per_request"] = (p.cpu() - before) / 1000 / max(result["requests"], 1)
                            result["rss"] = p.rss()
                            samples.setdefault(p.name, []).append(result)
                finally:
                    for p in peers:
                        p.stop()
            return samples
        return scenario

    def idle(_, work):
        return resting(("outrigger", "envoy", "haproxy"), lambda name, port: TcpPeer(name, work, port, True), lambda client: client)

    return {
        "tcp": through_wrk(64, True, 1024),
        "tcp-bulk": through_wrk(8, False, STREAM),
        "tcp-splice": through_wrk(8, True, STREAM),
        "conn-rate": through_wrk(16, True, 128, close=True),
        "idle-10k": idle,
    }


def resting(names, peer, dressed):
    """What each proxy holds for a connection that has said something once: PEER makes the proxy NAME in front of a port, DRESSED
    the client's stream of a connection."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Each connection has two ends in the proxy, and two in this program.
    count = min(IDLE, (hard - 1000) // 2)
    if count < IDLE:
        print(f"  {count} connections only: the limit of open files is {hard}")
    samples = {}
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        held = []
        threading.Thread(target=answer, args=(server, held), daemon=True).start()
        for name in names:
            p = peer(name, server.getsockname()[1])
            clients = []
            try:
                time.sleep(2)
                before = p.rss()
                for _ in range(count):
                    client = dressed(socket.create_connection(("127.0.0.1", p.port), 10))
                    client.sendall(EXCHANGED)
                    assert client.recv(len(EXCHANGED)), f"{name} closed connection {len(clients)}"
                    clients.append(client)
                time.sleep(5)
                samples.setdefault(name, []).append({
                    "rss": p.rss(), "rss_per_connection": (p.rss() - before) * 1024 / count})
            finally:
                for c in clients:
                    c.close()
                p.stop()
                time.sleep(1)
                for h in held:
                    h.close()
                held.clear()
    return samples


def answer(server, held):
    """Sends the first bytes of each connection back, and keeps the connection."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            connection.sendall(connection.recv(len(EXCHANGED)) or b"-")
            held.append(connection)


@contextlib.contextmanager
def file_origin(run, work):
    """nginx with one file, sent by sendfile(2)."""
    port = run.free_port()
    config = work / "files.conf"
    config.write_text(run.nginx_config(work, "files", f"""
  sendfile on; tcp_nopush on; open_file_cache max=10;
  server {{ listen 127.0.0.1:{port} backlog=4096; root {work}; location / {{ try_files /body =404; }} }}"""))
    process = subprocess.Popen(["taskset", "-c", run.LOAD_CORE, "nginx", "-c", str(config)])
    try:
        run.wait_for(port)
        yield port
    finally:
        process.terminate()
        process.wait()


def load(run, port, connections, seconds, extra):
    """wrk; a connection that the server closes after its answer is no error."""
    out = subprocess.run(["taskset", "-c", run.LOAD_CORE, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", *extra,
                          f"http://127.0.0.1:{port}/"], check=True, capture_output=True, text=True).stdout
    lines = out.splitlines()
    requests, rps, p50, p99 = 0, 0.0, 0.0, 0.0
    for words in map(str.split, lines):
        if len(words) > 2 and words[1:3] == ["requests", "in"]:
            requests = int(words[0])
        elif words[:1] == ["Requests/sec:"]:
            rps = float(words[1])
        elif words[:1] == ["50%"]:
            p50 = micros(words[1])
        elif words[:1] == ["99%"]:
            p99 = micros(words[1])
    bad = [line for line in lines if "Non-2xx" in line]
    if bad:
        raise SystemExit(f"wrong answers: {bad}")
    return {"requests": requests, "rps": rps, "p50": p50, "p99": p99}


def micros(text):
    for unit, factor in (("us", 1), ("ms", 1000), ("s", 1_000_000)):
        if text.endswith(unit):
            return float(text[:-len(unit)]) * factor
    raise ValueError(text)
