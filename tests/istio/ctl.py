"""A stock istioctl in a cluster with our control plane and bookinfo (`istio-system`, namespace `default`): what it asks
our control plane and our proxies, and what it prints of the answers."""
import json
import os
import re

from words import check, eventually, run as start


def run(istioctl, work):
    if not os.environ.get("KUBECONFIG"):
        from discovery import inside

        print("skipped: istioctl in a cluster: ./x test cluster runs it, or set KUBECONFIG to one with our mesh and bookinfo", flush=True)
        inside("istioctl", istioctl, work)
        return
    env = {**os.environ, "HOME": str(work)}

    def ctl(*words):
        return start(str(istioctl), *words, env=env)

    def good(name, words, *wanted):
        """The command succeeds, prints all of these, and complains of nothing."""
        done = ctl(*words)
        missing = [w for w in wanted if not re.search(w, done.stdout + done.stderr, re.M)]
        check(name, done.returncode == 0 and not missing and "Error" not in done.stderr,
              f"no {missing}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
        return done.stdout

    pods = kubectl("get", "pods", "-n", "default", "-o", "json")
    names = {p["metadata"]["labels"]["app"]: p["metadata"]["name"] for p in json.loads(pods)["items"]}
    pod = names["productpage"]
    replicas = [p["metadata"]["name"] for p in json.loads(kubectl("get", "pods", "-n", "istio-system", "-l", "app=istiod", "-o", "json"))["items"]]

    good("version", ["version"], r"^client version: ", r"^control plane version: \d+\.\d+\.\d+$", r"^data plane version: \S+ \(\d+ proxies\)$")
    told = json.loads(ctl("version", "-o", "json").stdout or "{}")
    check("version knows each replica", len(told.get("meshVersion") or []) == len(replicas), told.get("meshVersion"))
    check("and each proxy", len(told.get("dataPlaneVersion") or []) > 5, told.get("dataPlaneVersion"))
    good("x version, over xDS", ["x", "version"], r"version: \d+\.\d+\.\d+", r"^data plane version: \S+ \(\d+ proxies\)$")

    table = good("proxy-status", ["proxy-status"], r"^NAME +CLUSTER +ISTIOD +VERSION +SUBSCRIBED TYPES$")
    rows = [row.split(None, 4) for row in table.splitlines()[1:]]
    check("each proxy has a row, with the replica that serves it",
          {f"{n}.default" for n in names.values()} <= {r[0] for r in rows}
          and all(r[2] in replicas for r in rows), table)
    check("each is subscribed to all four types", all(re.match(r"[4-9] \(CDS,LDS,EDS,RDS", r[4]) for r in rows), table)
    verbose = good("proxy-status -v 1", ["proxy-status", "-v", "1"], r"^NAME +CLUSTER +CDS +LDS|^NAME +CLUSTER")
    check("all of it is in step", "SYNCED" in verbose and "ERROR" not in verbose and "STALE" not in verbose, verbose)
    good("proxy-status -o json", ["proxy-status", "-o", "json"], r'"configStatus": "SYNCED"')
    for app, name in sorted(names.items()):
        good(f"proxy-status {app}: nothing differs from what was sent", ["proxy-status", f"{name}.default"],
             r"^Clusters Match$", r"^Listeners Match$", r"^Routes Match")

    where = f"{pod}.default"
    good("proxy-config cluster", ["proxy-config", "cluster", where],
         r"^SERVICE FQDN +PORT +SUBSET +DIRECTION +TYPE +DESTINATION RULE", r"^reviews\.default\.svc\.cluster\.local +9080 +v1 +outbound +EDS +reviews\.default")
    good("proxy-config listener", ["proxy-config", "listener", where], r"^ADDRESSES +PORT +MATCH +DESTINATION", r"^0\.0\.0\.0 +15006 +.*Cluster: inbound\|9080\|\|")
    good("proxy-config route", ["proxy-config", "route", where], r"^NAME +VHOST NAME +DOMAINS +MATCH +VIRTUAL SERVICE", r"^9080 +reviews\.default")
    good("proxy-config endpoint", ["proxy-config", "endpoint", where], r"^ENDPOINT +STATUS +OUTLIER CHECK +CLUSTER", r"HEALTHY +OK +outbound\|9080\|v1\|reviews")
    good("proxy-config bootstrap", ["proxy-config", "bootstrap", where], r'"bootstrap"')
    good("proxy-config secret", ["proxy-config", "secret", where], r"^RESOURCE NAME +TYPE +STATUS +VALID CERT", r"^default +Cert Chain +ACTIVE +true", r"^ROOTCA +CA +ACTIVE +true")
    good("proxy-config log", ["proxy-config", "log", where], r"active loggers:", r"^ +upstream: ")
    good("proxy-config log --level", ["proxy-config", "log", where, "--level", "upstream:debug"], r"^ +upstream: debug")
    good("and back", ["proxy-config", "log", where, "--level", "upstream:warning"], r"^ +upstream: warning")
    # As with Envoy: where no filter comes by ECDS there is no such section.
    ecds = ctl("proxy-config", "ecds", where)
    check("proxy-config ecds", "no configuration type type.googleapis.com/envoy.admin.v3.EcdsConfigDump" in ecds.stderr, ecds.stdout + ecds.stderr)
    good("proxy-config all", ["proxy-config", "all", where], r"^NAME +SERVICE FQDN", r"^RESOURCE NAME", r"^NAME +STATUS +LOCALITY +CLUSTER", r"^NAME +VHOST NAME")
    for kind in ("cluster", "listener", "route", "endpoint", "secret", "bootstrap", "all"):
        done = ctl("proxy-config", kind, where, "-o", "json")
        check(f"proxy-config {kind} -o json", is_json(done.stdout) and done.returncode == 0, done.stdout[-300:] + done.stderr[-600:])
    gateway = json.loads(kubectl("get", "pods", "-n", "istio-system", "-l", "istio=ingressgateway", "-o", "json"))["items"][0]["metadata"]["name"]
    good("proxy-config route of the gateway", ["proxy-config", "route", f"{gateway}.istio-system"], r"/productpage")

    good("x describe pod", ["x", "describe", "pod", pod], rf"^Pod: {pod}$", r"Service: productpage", r"Effective PeerAuthentication")
    good("x authz check", ["x", "authz", "check", where], r"^ACTION +AuthorizationPolicy +RULES")
    good("analyze", ["analyze", "-n", "default"], r"No validation issues found|Info \[|Warning \[")
    good("remote-clusters", ["remote-clusters"], r"^NAME +SECRET +STATUS +ISTIOD", r"^Kubernetes +synced +")
    good("x internal-debug syncz", ["x", "internal-debug", "syncz"], r'"proxy": "\S+\.default"')
    good("x check-inject", ["x", "check-inject", pod], r"istio-sidecar-injector", r"✔")
    good("x injector list", ["x", "injector", "list"], r"default +istio-system|NAMESPACE +ISTIO-REVISION")
    good("x precheck", ["x", "precheck"])
    good("tag list", ["tag", "list"])


def files(istioctl, node):
    """Without a cluster: over xDS alone, with dumps that are read from files."""
    import api
    from discovery import HERE, pods_of
    from net import GATE

    api.TOKENS = lambda namespace, account: node.token(account, namespace)
    api.serve((GATE, 8001))
    (node.work / "kubeconfig").write_text(api.kubeconfig(f"http://{GATE}:8001"))
    control = node.outrigger(HERE / "mesh/objects")
    if not check("our control plane is ready", control.ready(), control.log()[-2000:]):
        return
    pods = pods_of(node)
    for pod in pods:
        pod.start()
    for pod in pods:
        if not check(f"{pod.name} is ready", eventually(pod.is_ready, 40), pod.log()[-3000:] + control.log()[-2000:]):
            return

    def ctl(*words):
        return start(str(istioctl), *words, "--kubeconfig", str(node.work / "kubeconfig"), env={**os.environ, "HOME": str(node.work)})

    xds = ["--xds-address", f"{GATE}:15012"]
    done = ctl("proxy-status", *xds)
    rows = [row.split(None, 4) for row in done.stdout.splitlines()]
    check("proxy-status over xDS", [r[0] for r in rows[1:]] == sorted(f"{p.name}.shop" for p in pods)
          and rows[0][:4] == ["NAME", "CLUSTER", "ISTIOD", "VERSION"]
          and all(r[1:3] == ["Kubernetes", "istiod-0"] and "CDS,LDS,EDS,RDS" in r[4] for r in rows[1:]), done.stdout + done.stderr[-1500:])
    done = ctl("proxy-status", "-v", "1", *xds)
    check("all of it is in step", done.stdout.count("SYNCED") >= 4 * len(pods) and "STALE" not in done.stdout and "ERROR" not in done.stdout,
          done.stdout + done.stderr[-1500:])
    done = ctl("proxy-status", "-o", "json", *xds)
    check("proxy-status -o json", is_json(done.stdout), done.stdout[-500:] + done.stderr[-500:])
    done = ctl("x", "version", *xds)
    check("x version", re.search(r"version: \d+\.\d+\.\d+", done.stdout) and f"({len(pods)} proxies)" in done.stdout, done.stdout + done.stderr[-1500:])
    done = ctl("x", "internal-debug", "syncz", *xds)
    check("x internal-debug syncz", "reviews-v1.shop" in done.stdout, done.stdout[-500:] + done.stderr[-1500:])
    for pod in pods:
        dump = node.work / f"{pod.name}.json"
        dump.write_text(pod.admin("/config_dump?include_eds=true"))
        done = ctl("proxy-status", f"{pod.name}.shop", "--file", str(dump), *xds)
        check(f"proxy-status {pod.name}: our proxy holds what it was sent",
              re.search(r"Clusters Match\nListeners Match\nRoutes Match", done.stdout), done.stdout[:3000] + done.stderr[-1500:])
        clusters = node.work / f"{pod.name}-clusters.json"
        clusters.write_text(pod.admin("/clusters?format=json"))
        for kind in ("cluster", "listener", "route", "endpoint", "secret", "bootstrap", "all"):
            for form in ((), ("-o", "json")):
                done = ctl("proxy-config", kind, "-f", str(clusters if kind == "endpoint" else dump), *form)
                good = done.returncode == 0 and (is_json(done.stdout) if form else len(done.stdout.splitlines()) > 1)
                check(f"proxy-config {kind} {' '.join(form)} of {pod.name}", good, done.stdout[-500:] + done.stderr[-800:])


def is_json(text):
    try:
        json.loads(text)
        return True
    except ValueError:
        return False


def kubectl(*words):
    return start("kubectl", *words).stdout
