"""A stock pilot-agent in the sidecar of reviews-v2: it starts our proxy in place of Envoy; everything else is ours."""
import json
import os
import pathlib
import re
import shutil
import signal
import urllib.request

from words import OUTRIGGER, TOP, check, eventually, run as start

V2_ALONE = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http: [{route: [{destination: {host: reviews, subset: v2}}]}]
"""

METRICS = """
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: all, namespace: istio-system}
spec: {metrics: [{providers: [{name: prometheus}]}]}
"""


def run(agent, work):
    template = bootstrap_of(agent)
    if not check("the agent has its template of the bootstrap", template,
                 f"no envoy_bootstrap_tmpl.json beside {agent}: give ISTIO_BOOTSTRAP"):
        return
    # A pod sees of this machine only what it mounts.
    (work / "bin").mkdir()
    shutil.copy(agent, work / "bin/pilot-agent")
    (work / "bin/pilot-agent").chmod(0o755)
    shutil.copy(template, work / "bin/envoy_bootstrap_tmpl.json")
    folder = work / "bookinfo"
    shutil.copytree(TOP / "examples/bookinfo", folder)
    annotate(folder / "bookinfo.yaml", work / "bin")
    (folder / "telemetry.yaml").write_text(METRICS)
    mesh = Mesh(work)
    up = mesh.call("up", "-f", str(folder), "--image", "stock=/opt/istio/pilot-agent", "--wait", "120")
    try:
        if check("the mesh comes up with the stock agent in reviews-v2", up.returncode == 0, up.stderr[-2000:] + mesh.log()[-3000:]):
            cases(mesh, folder, up)
    finally:
        mesh.call("down")


def bootstrap_of(agent):
    given = os.environ.get("ISTIO_BOOTSTRAP")
    candidates = [pathlib.Path(given)] if given else [agent.parent / "envoy_bootstrap_tmpl.json", agent.parent / "envoy_bootstrap.json"]
    return next((c for c in candidates if c.is_file()), None)


def annotate(path, programs):
    annotations = f"""      annotations:
        sidecar.istio.io/proxyImage: example.test/stock
        sidecar.istio.io/userVolume: '{{"stock": {{"hostPath": {{"path": "{programs}"}}}}}}'
        sidecar.istio.io/userVolumeMount: '{{"stock": {{"mountPath": "/opt/istio", "readOnly": true}}}}'
        proxy.istio.io/config: |
          terminationDrainDuration: 2s
          proxyMetadata: {{ISTIO_BOOTSTRAP: /opt/istio/envoy_bootstrap_tmpl.json}}
"""
    text, count = re.subn(
        r"(  name: reviews-v2\n(?:.*\n)*?  template:\n    metadata:\n)", lambda m: m[1] + annotations, path.read_text(), count=1)
    assert count == 1, "bookinfo.yaml has no reviews-v2"
    path.write_text(text)


class Mesh:
    def __init__(self, work):
        self.env = {**os.environ, "OUTRIGGER_STATE": str(work / "state")}

    def call(self, *words):
        return start(OUTRIGGER, "local", *words, env=self.env)

    def log(self, *words):
        return self.call("logs", "reviews-v2", "-c", "istio-proxy", *words).stdout

    def curl(self, url):
        return self.call("exec", "reviews-v2", "--", "curl", "-s", "--max-time", "5", url).stdout

    def process(self, pattern):
        """The pid on this machine of a process of reviews-v2."""
        for line in self.call("ps").stdout.splitlines():
            if "reviews-v2" in line and re.search(pattern, line):
                return int(re.search(r"\b(\d{2,})\b", line[line.index("reviews-v2") + 10:])[1])
        return None

    def synced(self):
        states = json.loads(start(OUTRIGGER, "ps", "-o", "json", env=self.env).stdout or "[]")
        one = [s for s in states if s["proxy"].startswith("reviews-v2.")]
        return one and all(r.get("sent") == r.get("acked") for r in one[0]["resources"].values() if r.get("sent"))


def cases(mesh, folder, up):
    ps = mesh.call("ps").stdout
    check("the agent is the stock one", re.search(r"reviews-v2 .*/opt/istio/pilot-agent proxy sidecar", ps), ps[-3000:])
    line = next((li for li in ps.splitlines() if "reviews-v2" in li and "envoy" in li and " -c " in li), "")
    flags = ["--drain-time-s", "--drain-strategy immediate", "--local-address-ip-version v4", "--file-flush-interval-msec 1000",
             "--disable-hot-restart", "--allow-unknown-static-fields", "-l warning"]
    check("it starts our proxy as its Envoy, with its own flags", all(f in line for f in flags), line or ps[-3000:])
    version = mesh.curl("http://127.0.0.1:15000/server_info")
    check("whose admin says that it is ours", "AWS-LC" in version and "LIVE" in version, version[:500])
    log = mesh.log()
    check("our proxy took the bootstrap of Istio's template without a warning",
          not re.search(r"(?i)unknown|unsupported|no effect|warn.*bootstrap", "\n".join(proxy_lines(log))), "\n".join(proxy_lines(log))[:2000])

    status = start(OUTRIGGER, "ps", "reviews-v2", env=mesh.env).stdout
    check("our proxy has accepted all that it was sent", eventually(mesh.synced) and "rejected" not in status, status)
    stats = mesh.curl("http://127.0.0.1:15000/stats?usedonly&filter=update_rejected$")
    check("no update was rejected", not re.search(r": [1-9]", stats), stats)
    certs = mesh.curl("http://127.0.0.1:15000/certs")
    check("its certificate came over the agent's socket", "spiffe://cluster.local/ns/" in certs and "bookinfo-reviews" in certs, certs[:1000])

    gateway = re.search(r"(http://\S+) -> istio-ingressgateway.istio-system port 80 ", mesh.call("ps").stdout + up.stdout)[1]
    (folder / "reviews.yaml").write_text(V2_ALONE)

    def page():
        try:
            with urllib.request.urlopen(f"{gateway}/productpage", timeout=5) as answer:
                return answer.read().decode()
        except OSError as e:
            return str(e)

    def black_stars():
        pages = [page() for _ in range(5)]
        return all("reviews-v2" in p and "black" in p for p in pages)

    check("pages with reviews and ratings through it", eventually(black_stars, 30), page()[:500])
    merged = mesh.curl("http://127.0.0.1:15020/stats/prometheus")
    calls = [line for line in merged.splitlines() if line.startswith("istio_requests_total{")]
    check("the agent merges our proxy's statistics with its own",
          calls and "istio_agent_" in merged and "envoy_server_uptime" in merged, merged[:1500])
    check("calls to it were mutual TLS, and calls of it were counted, too",
          any('reporter="destination"' in c and 'connection_security_policy="mutual_tls"' in c for c in calls)
          and any('reporter="source"' in c and 'destination_service_name="ratings"' in c for c in calls), calls)
    check("what the template leaves out is left out", "upstream_rq_200" not in merged, merged[:300])
    ready = mesh.call("exec", "reviews-v2", "--", "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}",
                      "http://127.0.0.1:15021/healthz/ready").stdout
    check("readiness is answered on 15021, by way of our proxy", ready == "200", ready)
    asked = mesh.call("exec", "reviews-v2", "-c", "istio-proxy", "--", "/opt/istio/pilot-agent", "request", "GET", "server_info")
    check("pilot-agent request reaches our admin", '"state": "LIVE"' in asked.stdout, asked.stdout[:300] + asked.stderr[:300])

    old = mesh.process(r"envoy .*-c ")
    agent = mesh.process(r"pilot-agent proxy sidecar")
    if not check("the processes are found", old and agent, mesh.call("ps").stdout[-2000:]):
        return
    os.kill(old, signal.SIGKILL)

    def again():
        new = mesh.process(r"envoy .*-c ")
        return new and new != old and black_stars()

    check("killed, it comes again with its agent", eventually(again, 60), mesh.log()[-2000:])
    agent = mesh.process(r"pilot-agent proxy sidecar")
    os.kill(agent, signal.SIGTERM)
    previous = eventually(lambda: "Agent has successfully terminated" in mesh.log("-p") and mesh.log("-p"), 30)
    check("SIGTERM drains our proxy by its admin, and ends both",
          previous and "failed draining" not in previous and "Error in invoking drain" not in previous, (previous or mesh.log())[-2000:])
    check("and it comes again", eventually(black_stars, 60), mesh.log()[-2000:])


def proxy_lines(log):
    """What our proxy printed: lines in Envoy's format."""
    return [line for line in log.splitlines() if re.search(r"\t(warning|error|critical)\tenvoy ", line)]
