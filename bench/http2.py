"""HTTP/2 scenarios of the bench: HTTP/2 in front of HTTP/1 (h2-h1), and gRPC-shaped calls with HTTP/2 on both sides (grpc).

Load is h2load with 8 connections of 16 streams each. `h2-h1` is `GET` of 1 KiB from nginx; `grpc` is a unary call: POST of
a 5-byte message, answered by nghttpd with what was sent and the trailer `grpc-status: 0`. Latencies are h2load's, in
microseconds. HAProxy speaks both too and is measured beside Envoy.
"""
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time

CONNECTIONS, STREAMS = 8, 16


def scenarios(run):
    """The scenarios by name; `run` is the bench program."""

    class Http2Peer(run.Peer):
        def __init__(self, name, work, upstream, http2):
            if name != "haproxy":
                self.http2 = http2
                super().__init__(name, work, upstream)
                return
            self.name, self.port = name, run.free_port()
            config = work / "haproxy.conf"
            config.write_text(f"""
global
  nbthread 1
  maxconn 4000
defaults
  mode http
  timeout connect 1s
  timeout client 30s
  timeout server 30s
  http-reuse always
frontend f
  bind 127.0.0.1:{self.port} proto h2
  default_backend b
backend b
  server s 127.0.0.1:{upstream}{" proto h2" if http2 else ""}
""")
            self.process = subprocess.Popen(["taskset", "-c", run.PROXY_CORE, "haproxy", "-f", str(config), "-db"],
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            self.start_ms = 0
            wait_for_port(self.port)

        def config(self, listen, admin, clusters, filler=0):
            config = run.v3_config(listen, admin, clusters, filler)
            if self.http2:
                kind = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
                for cluster in config["static_resources"]["clusters"]:
                    cluster["typed_extension_protocol_options"] = {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": kind, "explicit_http_config": {"http2_protocol_options": {}}}}
            return config

    def wait_for_port(port):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            time.sleep(0.01)
        sys.exit(f"nothing listens on port {port}")

    @contextlib.contextmanager
    def grpc_origin(work):
        port = run.free_port()
        process = subprocess.Popen(["taskset", "-c", run.LOAD_CORE, "nghttpd", "--no-tls", "--echo-upload", "-n1",
                                    "--trailer", "grpc-status: 0", "-d", str(work), str(port)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_port(port)
            yield port
        finally:
            process.terminate()
            process.wait()

    def load(work, port, grpc, seconds):
        log = work / "h2load.log"
        log.unlink(missing_ok=True)
        command = ["taskset", "-c", run.LOAD_CORE, "h2load", "-t1", f"-c{CONNECTIONS}", f"-m{STREAMS}", f"-D{seconds}",
                   f"--log-file={log}"]
        if grpc:
            message = work / "message"
            message.write_bytes(b"\0\0\0\0\0")
            command += ["-H", "content-type: application/grpc", "-H", "te: trailers", "-d", str(message)]
        out = subprocess.run([*command, f"http://127.0.0.1:{port}/"], check=True, capture_output=True, text=True).stdout
        done, failed, errored = (int(re.search(rf"(\d+) {word}", out)[1]) for word in ("succeeded", "failed", "errored"))
        errors = failed + errored
        if errors:
            print(f"  {errors} errors of {done + errors} requests", file=sys.stderr)
        times = sorted(int(line.rsplit("\t", 1)[1]) for line in log.read_text().splitlines() if line.count("\t") == 2)
        at = lambda share: times[min(len(times) - 1, int(len(times) * share))] if times else 0
        return {"requests": done, "rps": done / seconds, "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "errors": errors}

    def scenario(grpc):
        def measure(options, work):
            for tool in ("h2load", "nghttpd"):
                if not shutil.which(tool):
                    sys.exit(f"{tool} is missing: ./x bench installs it")
            samples = {}
            with (grpc_origin if grpc else run.origin)(work) as upstream:
                peers = [Http2Peer(name, work, upstream, grpc) for name in ("outrigger", "envoy", "haproxy")]
                try:
                    for peer in peers:
                        load(work, peer.port, grpc, 1)
                    for _ in range(options.rounds):
                        for peer in peers:
                            before = peer.cpu()
                            result = load(work, peer.port, grpc, options.seconds)
                            result["cpu_per_request"] = (peer.cpu() - before) / 1000 / max(result["requests"], 1)
                            result["rss"] = peer.rss()
                            samples.setdefault(peer.name, []).append(result)
                finally:
                    for peer in peers:
                        peer.stop()
            return samples
        return measure

    return {"h2-h1": scenario(False), "grpc": scenario(True)}
