"""A real istiod, from files and without a cluster, drives our agents and proxies: two pods of one service, a client and a
gateway, each a network namespace behind a bridge of its own.

Everything runs in namespaces of the case (network, mounts, processes), so that ports are nobody else's and nothing is
left over.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

from words import FAILED, PASSED, check

HERE = pathlib.Path(__file__).resolve().parent


def run(istiod, work):
    inside("istiod", istiod, work)


def inside(which, program, work):
    """Runs a case of this file in namespaces of its own."""
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
               sys.executable, "-B", str(HERE / "discovery.py"), which, str(program), str(work)]
    done = subprocess.run(command)
    results = work / "results.json"
    if not results.exists():
        check("the case runs to its end", False, f"status {done.returncode}")
        return
    passed, failed = json.loads(results.read_text())
    PASSED.extend(passed)
    FAILED.extend(failed)


def main():
    which, (program, work) = sys.argv[1], map(pathlib.Path, sys.argv[2:])
    from net import Node

    node = Node(work)
    if which == "istiod":
        control = node.istiod(program, HERE / "mesh/mesh.yaml", HERE / "mesh/objects")
        if check("istiod is ready", control.ready(), control.log()[-2000:]):
            cases(node, control)
    else:
        import ctl

        ctl.files(program, node)
    (work / "results.json").write_text(json.dumps([PASSED, FAILED]))


def pods_of(node):
    return [
        node.pod("reviews-v1", "10.77.0.11", {"app": "reviews", "version": "v1"}, "reviews"),
        node.pod("reviews-v2", "10.77.0.12", {"app": "reviews", "version": "v2"}, "reviews"),
        node.pod("client", "10.77.0.13", {"app": "client"}, "client"),
        node.pod("gateway", "10.77.0.14", {"istio": "ingressgateway"}, "gateway", role="router"),
    ]


def cases(node, control):
    from words import eventually

    pods = pods_of(node)
    agent = os.environ.get("PILOT_AGENT")
    for pod in pods:
        # With a stock agent at hand, too, it has one of the pods: nothing of the control's side is ours there.
        stock = agent if pod.name == "reviews-v2" else None
        pod.start(stock)
    for pod in pods:
        if not check(f"{pod.name} is ready{' with a stock agent' if pod.stock else ''}", eventually(pod.is_ready, 40), pod.log()[-3000:]):
            return
    client, gateway = pods[2], pods[3]

    def call(*more):
        return client.curl("http://10.78.0.1:9080/", "-H", "Host: reviews.shop.svc.cluster.local:9080", *more)

    check("a call goes through both sidecars", eventually(lambda: "reviews-v" in call()), call() + client.log()[-2000:])
    check("a header chooses the subset", all("reviews-v2" in call("-H", "end-user: jason") for _ in range(5)), call("-H", "end-user: jason"))
    check("everybody else gets the other", all("reviews-v1" in call() for _ in range(5)), call())
    check("the application sees whose call it is",
          "By=spiffe://cluster.local/ns/shop/sa/reviews" in call() and "URI=spiffe://cluster.local/ns/shop/sa/client" in call(), call())
    check("a policy of istiod refuses", eventually(lambda: client.status("http://10.78.0.1:9080/admin") == "403"), client.status("http://10.78.0.1:9080/admin"))
    quiet = client.status("http://10.78.0.1:9080/quiet")
    client.status("http://10.78.0.1:9080/admin?last")
    logged = eventually(lambda: "/admin?last" in client.log())
    check("an expression of Telemetry says what is logged", quiet == "200" and logged and "/quiet" not in client.log(), client.log()[-2000:])
    bad = client.status("http://10.78.0.1:9080/", "-H", "Authorization: Bearer x.y.z")
    check("a token that is none is refused", bad == "401", bad)
    fault = client.status("http://10.78.0.1:9080/broken")
    check("a fault is injected", fault == "418", fault)
    through = eventually(lambda: gateway.reached("http://10.77.0.14:8080/", "-H", "Host: shop.example.com"))
    check("the gateway lets in", "reviews-v1" in (through or ""), through or gateway.log()[-2000:])
    check("and answers an unknown host with 404", gateway.code("http://10.77.0.14:8080/", "-H", "Host: other.example.com") == "404", "")
    tcp = client.curl("http://10.78.0.1:9081/")
    check("a TCP port is carried", "reviews-v" in tcp, tcp + client.log()[-1500:])
    plain = node.curl("http://10.77.0.11:9080/")
    check("STRICT refuses plain text", "reviews-v1" not in plain, plain)

    for pod in pods:
        dump = json.loads(pod.admin("/config_dump"))
        errors = re.findall(r'"(?:errorState|error_state)": ?\{[^}]*\}', json.dumps(dump))
        check(f"{pod.name} holds nothing that it rejected", not errors, errors[:3])
        stats = pod.admin("/stats?usedonly&filter=update_rejected$")
        check(f"{pod.name} has counted no rejection", not re.search(r": [1-9]", stats), stats)
    told = control.page("/debug/syncz")
    check("istiod knows of no error", "last_error" not in told.lower() and "lasterror" not in told.lower(), told[:3000])
    rejected = [line for line in control.page("/metrics").splitlines() if re.match(r"pilot_(total_xds_rejects|xds_.ds_reject)", line)]
    check("and has counted none", not rejected, rejected)
    nacks = [line for line in control.log().splitlines() if "ACK ERROR" in line or "NACK" in line]
    check("no NACK in its log", not nacks, nacks[:5])

    control.edit("reviews.yaml", "subset: v1", "subset: v2")
    check("an edit arrives", eventually(lambda: "reviews-v2" in call()), call())
    stats = client.admin("/stats?usedonly&filter=outbound.9080.*upstream_rq_200")
    check("the clusters that served are istiod's", "outbound|9080|v1|reviews.shop" in stats and "outbound|9080|v2|reviews.shop" in stats, stats)
    ended = [pod for pod in pods if pod.stop() is False]
    check("SIGTERM ends every pod", not ended, [p.name for p in ended])


if __name__ == "__main__":
    main()
