"""HTTP/1 scenarios of the bench: wrk over connections that stay open, bodies of 128 B, 1 KiB and 64 KiB.

Also `rate-1000`: 1,000 requests a second whatever the answers do, with access log and metrics on, and the same without
a proxy; `added_p99` is what the proxy adds to the latency, in microseconds from when a request was due.
"""
import re
import subprocess


def scenarios(run):
    """The scenarios by name; `run` is the bench program."""

    def through_wrk(connections, size):
        def scenario(options, work):
            samples = {}
            with run.origin(work, size) as upstream:
                peers = [run.Peer(n, work, upstream) for n in ("outrigger", "envoy", "haproxy", "nginx", "pump")]
                try:
                    for p in peers:
                        run.load(work, p.port, connections, 1)
                    for _ in range(options.rounds):
                        for p in peers:
                            before = p.cpu()
                            result = run.load(work, p.port, connections, options.seconds)
                            result["cpu_per_request"] = (p.cpu() - before) / 1000 / max(result["requests"], 1)
                            result["rss"] = p.rss()
                            samples.setdefault(p.name, []).append(result)
                finally:
                    for p in peers:
                        p.stop()
            return samples
        return scenario

    class Logging(run.Peer):
        """A proxy that writes a line for each request and keeps its metrics, as Istio configures one."""

        def config(self, listen, admin, clusters, filler):
            config = run.v3_config(listen, admin, clusters, filler)
            hcm = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
            kind = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
            hcm["access_log"] = [{"name": "envoy.access_loggers.file", "typed_config": {
                "@type": kind, "path": str(self.work / f"{self.name}.log")}}]
            return config

        def __init__(self, name, work, upstream):
            self.work = work
            super().__init__(name, work, upstream)

    def at_rate(port, rate, seconds):
        out = subprocess.run(["taskset", "-c", run.LOAD_CORE, str(run.RELEASE / "bench-rate"), f"127.0.0.1:{port}", str(rate),
                              str(seconds)], check=True, capture_output=True, text=True).stdout
        requests, errors, p50, p99, p999 = map(int, re.search(r"RESULT (.*)", out)[1].split())
        return {"requests": requests, "errors": errors, "p50": p50, "p99": p99, "p999": p999}

    def rate(options, work):
        samples = {}
        with run.origin(work, 128) as upstream:
            peers = [Logging(n, work, upstream) for n in ("outrigger", "envoy")]
            # These write no log: what they need is what waking up for a request costs by itself.
            peers += [run.Peer(n, work, upstream) for n in ("haproxy", "pump")]
            try:
                for _ in range(options.rounds):
                    direct = at_rate(upstream, 1000, options.seconds)
                    samples.setdefault("direct", []).append(direct)
                    for p in peers:
                        before = p.cpu()
                        result = at_rate(p.port, 1000, options.seconds)
                        result["cpu_per_request"] = (p.cpu() - before) / 1000 / max(result["requests"], 1)
                        result["added_p99"] = max(result["p99"] - direct["p99"], 0)
                        samples.setdefault(p.name, []).append(result)
            finally:
                for p in peers:
                    p.stop()
        return samples

    return {
        **{f"h1-{n}": through_wrk(n, 128) for n in (1, 16, 64, 256)},
        "h1-1k": through_wrk(64, 1024),
        "h1-64k": through_wrk(64, 64 << 10),
        "rate-1000": rate,
    }
