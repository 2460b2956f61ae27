"""Interception: app -> sidecar -> sidecar -> app between two network namespaces, one way to capture after the other.

Both sidecars forward to the original destination and do nothing else, so that what differs is the way in. `none` is the
same path without rules and sidecars, `outrigger` stands for iptables-nft REDIRECT, which the others are compared with.
`ebpf` is the connect hook and sk_lookup, `ebpf-sockmap` passes the bytes from socket to socket as well, in the pods and
between them. Every pod has a cgroup of its own in every mode, since that alone costs something.
`cpu_per_request` is both sidecars' time on a core; `system_cpu_per_request` is the machine's, the kernel's included: run
it on a machine that does nothing else. `connections_per_second` closes each connection after one request.
"""
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

CLIENT, SERVER, PORT = "10.77.0.1", "10.77.0.2", 8080
# One more way to capture is one more line: flags of istio-iptables, and whether the inbound socket is transparent.
MODES = {
    "none": None,
    "outrigger": ("-m REDIRECT --force-iptables-binary nft", False),
    "legacy": ("-m REDIRECT --force-iptables-binary legacy", False),
    "nft": ("-m REDIRECT --native-nftables", False),
    "tproxy": ("-m TPROXY --force-iptables-binary nft", True),
    "ebpf": ("-m EBPF", False),
    "ebpf-sockmap": (f"-m EBPF --ebpf-sockmap node=bench-{os.getpid()}", False),
}
FLAGS = "-p 15001 -z 15006 -u 1337 -i * -b * -d 15090,15021,15020".split()
TYPE = "type.googleapis.com/envoy.extensions.filters"


def sidecar_config(transparent):
    """Outbound at 15001, inbound at 15006; the app is called from 127.0.0.6, which the rules know, or from the client's
    address."""
    def listener(name, port, cluster, transparent=False):
        # The app sees the client's own address: the mark leads its answers back.
        more = [{"name": "envoy.filters.listener.original_src", "typed_config": {
            "@type": f"{TYPE}.listener.original_src.v3.OriginalSrc", "mark": 1337}}] if transparent else []
        router = {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{TYPE}.http.router.v3.Router"}}
        hcm = {"@type": f"{TYPE}.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": name,
               "route_config": {"name": name, "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
                   {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "15s"}}]}]},
               "http_filters": [router]}
        out = {"name": name, "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
               "listener_filters": [{"name": "envoy.filters.listener.original_dst", "typed_config": {
                   "@type": f"{TYPE}.listener.original_dst.v3.OriginalDst"}}, *more],
               "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager",
                                               "typed_config": hcm}]}]}
        return {**out, "transparent": True} if transparent else out

    def cluster(name, bind=None):
        out = {"name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s"}
        if bind:
            out["upstream_bind_config"] = {"source_address": {"address": bind, "port_value": 0}}
        return out

    return {"admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
            "static_resources": {
                "listeners": [listener("outbound", 15001, "out"), listener("inbound", 15006, "in", transparent)],
                "clusters": [cluster("out"), cluster("in", None if transparent else "127.0.0.6")]}}


def cgroup2():
    """Where cgroup2 is mounted."""
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return pathlib.Path(path)
    sys.exit("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")


class Pod:
    """A network namespace with an address, a cgroup, and processes in both."""

    def __init__(self, name):
        self.name, self.processes = name, []
        self.cgroup = cgroup2() / name
        self.cgroup.mkdir()
        subprocess.run(["ip", "netns", "add", name], check=True)

    def command(self, core, *command):
        join = ["sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec "$@"', str(self.cgroup)]
        return [*join, "ip", "netns", "exec", self.name, "taskset", "-c", core, *command]

    def rules(self, program, *flags):
        """Writes or removes rules from outside: eBPF programs are kept in the node's mounts."""
        place = ["--network-namespace", f"/run/netns/{self.name}", "--ebpf-cgroup", str(self.cgroup)]
        done = subprocess.run([program, "istio-iptables", *place, *flags], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"istio-iptables {' '.join(flags)}: {done.stdout[-500:]}{done.stderr[-500:]}")

    def run(self, *command):
        done = subprocess.run(["ip", "netns", "exec", self.name, *command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-500:]}")
        return done.stdout

    def start(self, core, *command):
        process = subprocess.Popen(self.command(core, *command), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        self.processes.append(process)
        return process

    def remove(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        subprocess.run(["ip", "netns", "del", self.name], check=False)
        # The last processes may still be on their way out.
        for _ in range(100):
            with contextlib.suppress(OSError):
                self.cgroup.rmdir()
                return
            time.sleep(0.02)


@contextlib.contextmanager
def path(bench, work, mode):
    """Both pods in one mode, with the app serving; gives the pods and the sidecars."""
    client, server = (Pod(f"outrigger-bench-{os.getpid()}-{side}") for side in "ab")
    try:
        subprocess.run(["ip", "link", "add", "eth0", "netns", client.name, "type", "veth",
                        "peer", "name", "eth0", "netns", server.name], check=True)
        for pod, address in ((client, CLIENT), (server, SERVER)):
            for words in (f"addr add {address}/24 dev eth0", "link set lo up", "link set eth0 up"):
                pod.run("ip", *words.split())
        root = work / "www"
        root.mkdir(exist_ok=True)
        for size in (128, 65536):
            (root / f"{size}").write_text("x" * size)
        config = work / "app.conf"
        config.write_text(bench.nginx_config(work, "app", f"""
  sendfile on; tcp_nopush on;
  server {{ listen {SERVER}:{PORT}; location / {{ root {root}; default_type text/plain; }} }}"""))
        server.start(bench.LOAD_CORE, "nginx", "-c", str(config))
        sidecars = []
        if MODES[mode]:
            flags, transparent = MODES[mode]
            program = str(bench.RELEASE / "outrigger")
            bootstrap = work / f"{mode}.json"
            bootstrap.write_text(json.dumps(sidecar_config(transparent)))
            # NET_ADMIN, which a transparent socket needs, is root's; the group tells the rules who it is.
            user = [] if transparent else ["--reuid", "1337"]
            for pod in (client, server):
                pod.rules(program, *FLAGS, *flags.split())
                sidecars.append(pod.start(bench.PROXY_CORE, "setpriv", *user, "--regid", "1337", "--clear-groups", program,
                                          "proxy", "-c", str(bootstrap), "--concurrency", "1", "--disable-hot-restart",
                                          "-l", "error"))
        get = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "curl", "-sf", "-o", "/dev/null",
               "--retry", "60", "--retry-all-errors", "--retry-delay", "0", "--retry-max-time", "30", f"http://{SERVER}:{PORT}/128"]
        subprocess.run(client.command(bench.LOAD_CORE, *get), check=True)
        yield client, sidecars
    finally:
        if MODES[mode] and "EBPF" in MODES[mode][0]:
            for pod in (client, server):
                pod.rules(str(bench.RELEASE / "outrigger"), "--cleanup-only")
        client.remove()
        server.remove()


def cpu(processes):
    """Nanoseconds on a core, all threads."""
    total = 0
    for process in processes:
        for task in pathlib.Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total


def system_cpu():
    """Microseconds that the machine's cores were busy."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) * 1_000_000 // os.sysconf("SC_CLK_TCK")


def load(bench, work, client, size, connections, seconds, close=False):
    script = work / "report.lua"
    script.write_text(bench.WRK_REPORT)
    header = ["-H", "Connection: close"] if close else []
    command = client.command(bench.LOAD_CORE, "setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "wrk", "-t1",
                             f"-c{connections}", f"-d{seconds}s", "-s", str(script), *header, f"http://{SERVER}:{PORT}/{size}")
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    requests, duration, p50, p99, p999, errors = map(int, re.search(r"RESULT (.*)", out)[1].split())
    return {"requests": requests, "rps": requests / (duration / 1e6), "p50": p50, "p99": p99, "p999": p999, "errors": errors}


def scenario(bench, size):
    def run(options, work):
        samples = {}
        for _ in range(options.rounds):
            for mode in MODES:
                with path(bench, work, mode) as (client, sidecars):
                    load(bench, work, client, size, 32, 1)
                    before, machine = cpu(sidecars), system_cpu()
                    result = load(bench, work, client, size, 32, options.seconds)
                    requests = max(result["requests"], 1)
                    result["cpu_per_request"] = (cpu(sidecars) - before) / 1000 / requests
                    result["system_cpu_per_request"] = (system_cpu() - machine) / requests
                    short = load(bench, work, client, size, 16, max(1, options.seconds // 2), close=True)
                    result["connections_per_second"] = short["rps"]
                    result["errors"] += short["errors"]
                    samples.setdefault(mode, []).append(result)
        return samples
    return run


def scenarios(bench):
    return {"intercept-128": scenario(bench, 128), "intercept-64k": scenario(bench, 65536)}
