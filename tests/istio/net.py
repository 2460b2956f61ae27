"""A node of its own for a control plane and pods: a bridge, an authority, tokens, and what a pod mounts."""
import base64
import http.server
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time

import api
from words import OUTRIGGER, PROXY, eventually, run

HERE = pathlib.Path(__file__).resolve().parent
GATE = "10.77.0.1"
APP = """
import http.server, socketserver, sys, threading
class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = (sys.argv[1] + " " + self.path + "\\n" + str(self.headers)).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
# (The one of http.server looks its own name up, for which there is nobody here.)
socketserver.ThreadingTCPServer.allow_reuse_address = True
for port in (9080, 9081):
    server = socketserver.ThreadingTCPServer(("0.0.0.0", port), Page)
    threading.Thread(target=server.serve_forever).start()
"""


def must(*command, **more):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **more)


def signed(text, key):
    encode = lambda b: base64.urlsafe_b64encode(b).rstrip(b"=").decode()  # noqa: E731
    head = encode(json.dumps({"alg": "RS256", "kid": "k", "typ": "JWT"}).encode())
    body = encode(json.dumps(text).encode())
    signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", str(key)], input=f"{head}.{body}".encode(),
                               capture_output=True, check=True).stdout
    return f"{head}.{body}.{encode(signature)}"


class Node:
    def __init__(self, work):
        self.work = work
        shutil.copytree("/etc", work / "etc", symlinks=True, ignore_dangling_symlinks=True)
        (work / "etc/istio").mkdir(exist_ok=True)
        (work / "etc/hosts").write_text(f"127.0.0.1 localhost\n{GATE} istiod.istio-system.svc\n")
        must("mount", "--bind", str(work / "etc"), "/etc")
        must("mount", "-t", "tmpfs", "tmpfs", "/run")
        for folder in ("/run/netns", "/run/secrets"):
            os.mkdir(folder)
        for command in ("link set lo up", "link add br0 type bridge", f"address add {GATE}/24 dev br0", "link set br0 up"):
            must("ip", *command.split())
        self.authority()

    def authority(self):
        """Certificates for istiod to sign with, and a key for tokens."""
        ca = self.work / "cacerts"
        ca.mkdir()
        must("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/O=test/CN=root",
             "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
             "-keyout", str(ca / "ca-key.pem"), "-out", str(ca / "ca-cert.pem"), stderr=subprocess.DEVNULL)
        for name in ("root-cert.pem", "cert-chain.pem"):
            shutil.copy(ca / "ca-cert.pem", ca / name)
        self.key = self.work / "tokens.pem"
        must("openssl", "genrsa", "-out", str(self.key), "2048", stderr=subprocess.DEVNULL)
        modulus = subprocess.run(["openssl", "rsa", "-in", str(self.key), "-noout", "-modulus"], capture_output=True, text=True,
                                 check=True).stdout.strip().split("=")[1]
        n = base64.urlsafe_b64encode(bytes.fromhex(modulus)).rstrip(b"=").decode()
        self.keys = json.dumps({"keys": [{"kty": "RSA", "kid": "k", "alg": "RS256", "use": "sig", "e": "AQAB", "n": n}]})

    def token(self, account, namespace="shop"):
        now = int(time.time())
        return signed({"iss": "https://tokens.test", "sub": f"system:serviceaccount:{namespace}:{account}", "aud": ["istio-ca"],
                       "iat": now, "exp": now + 3600, "kubernetes.io": {"namespace": namespace}}, self.key)

    def istiod(self, program, mesh, objects):
        return Istiod(self, program, mesh, objects)

    def outrigger(self, objects):
        return Outrigger(self, objects)

    def pod(self, *words, **more):
        return Pod(self, *words, **more)

    def curl(self, url, *more):
        return run("curl", "-s", "--max-time", "5", *more, url).stdout


class Istiod:
    def __init__(self, node, program, mesh, objects):
        self.node = node
        self.folder = node.work / "objects"
        shutil.copytree(objects, self.folder)
        keys = node.keys.encode()

        class Keys(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("content-length", str(len(keys)))
                self.end_headers()
                self.wfile.write(keys)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer((GATE, 8000), Keys)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api.serve((GATE, 8001))
        (node.work / "kubeconfig").write_text(api.kubeconfig(f"http://{GATE}:8001"))
        rule = {"issuer": "https://tokens.test", "jwksUri": f"http://{GATE}:8000/", "audiences": ["istio-ca"]}
        env = {**os.environ, "ROOT_CA_DIR": str(node.work / "cacerts"), "JWT_RULE": json.dumps(rule), "POD_NAME": "istiod-real",
               "POD_NAMESPACE": "istio-system", "CLUSTER_ID": "Kubernetes", "PILOT_ENABLE_ANALYSIS": "false"}
        self.output = node.work / "istiod.log"
        log = open(self.output, "w")
        flags = [f"--kubeconfig={node.work}/kubeconfig", f"--configDir={self.folder}", f"--meshConfig={mesh}", "--networksConfig=/nowhere",
                 "--httpsAddr=", "--ctrlz_port=0", "--domain=cluster.local", "--log_target=stdout"]
        self.process = subprocess.Popen([program, "discovery", *flags], stdout=log, stderr=log, env=env, cwd=str(node.work))

    def page(self, path):
        return self.node.curl(f"http://{GATE}:15014{path}")

    def log(self):
        return self.output.read_text()

    def ready(self):
        return eventually(lambda: run("curl", "-sf", f"http://{GATE}:8080/ready").returncode == 0, 60)

    def edit(self, name, old, new):
        path = self.folder / name
        text = path.read_text()
        assert old in text, f"{name} has no {old}"
        (self.folder / f".{name}").write_text(text.replace(old, new))
        os.replace(self.folder / f".{name}", path)


class Outrigger:
    """Our control plane over the same files."""

    def __init__(self, node, objects):
        self.node = node
        self.output = node.work / "control.log"
        (node.work / "keys.json").write_text(node.keys)
        log = open(self.output, "w")
        flags = ["--config", str(objects), "--grpcAddr=", f"--secureGRPCAddr={GATE}:15012", f"--monitoringAddr={GATE}:15014",
                 "--tokenKeys", str(node.work / "keys.json"), "--caCertsDir", str(node.work / "cacerts"), "--stateDir", str(node.work / "state"),
                 "--replica=istiod-0"]
        self.process = subprocess.Popen([OUTRIGGER, "control", *flags], stdout=log, stderr=log)

    def log(self):
        return self.output.read_text()

    def ready(self):
        return eventually(lambda: run("curl", "-sf", f"http://{GATE}:15014/ready").returncode == 0, 30)


class Pod:
    """A sidecar or gateway, with an application beside a sidecar."""

    def __init__(self, node, name, address, labels, account, role="sidecar"):
        self.node, self.name, self.address, self.labels, self.account, self.role = node, name, address, labels, account, role
        self.stock = None
        self.home = node.work / name
        secrets, istio = self.home / "secrets", self.home / "istio"
        for folder in (secrets / "tokens", secrets / "istio", secrets / "workload-spiffe-uds", istio / "proxy", istio / "pod"):
            folder.mkdir(parents=True)
        (secrets / "tokens/istio-token").write_text(node.token(account))
        shutil.copy(node.work / "cacerts/root-cert.pem", secrets / "istio/root-cert.pem")
        (istio / "pod/labels").write_text("".join(f'{k}="{v}"\n' for k, v in labels.items()))
        (istio / "pod/annotations").write_text("")
        must("chown", "-R", "1337:1337", str(self.home))
        veth = f"v{address.rsplit('.', 1)[1]}"
        for command in (f"netns add {name}", f"link add {veth} type veth peer name eth0 netns {name}", f"link set {veth} master br0 up",
                        f"-n {name} address add {address}/24 dev eth0", f"-n {name} link set eth0 up", f"-n {name} link set lo up",
                        f"-n {name} route add default via {GATE}"):
            must("ip", *command.split())

    def inside(self, *command, user=None):
        who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        return ["ip", "netns", "exec", self.name, *who, *command]

    def start(self, stock=None):
        self.stock = stock
        programs = self.home / "bin"
        programs.mkdir()
        for name in ("pilot-agent", "envoy", "istio-iptables"):
            os.symlink(PROXY, programs / name)
        if self.role == "sidecar":
            must(*self.inside(str(programs / "istio-iptables"), "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT",
                              "-i", "*", "-b", "*", "-d", "15090,15021,15020"))
            subprocess.Popen(self.inside("python3", "-c", APP, self.name, user=1000))
        proxy_config = {"binaryPath": str(programs / "envoy"), "discoveryAddress": "istiod.istio-system.svc:15012",
                        "terminationDrainDuration": "1s", "concurrency": 1}
        env = {"PATH": os.environ["PATH"], "POD_NAME": self.name, "POD_NAMESPACE": "shop", "INSTANCE_IP": self.address,
               "SERVICE_ACCOUNT": self.account, "PROXY_CONFIG": json.dumps(proxy_config), "PILOT_CERT_PROVIDER": "istiod",
               "CA_ADDR": "istiod.istio-system.svc:15012", "ISTIO_META_CLUSTER_ID": "Kubernetes",
               "ISTIO_META_WORKLOAD_NAME": self.name, "ISTIO_META_MESH_ID": "cluster.local", "TRUST_DOMAIN": "cluster.local",
               "ISTIO_META_POD_PORTS": json.dumps([{"containerPort": 9080}]), "ISTIO_META_INTERCEPTION_MODE": "REDIRECT"}
        agent = str(programs / "pilot-agent")
        if stock:
            from agent import bootstrap_of

            agent = stock
            env["ISTIO_BOOTSTRAP"] = str(bootstrap_of(pathlib.Path(stock)))
        # /run and /etc are the case's own; what a pod mounts there is the pod's.
        mounts = f"mount --bind {self.home}/secrets /run/secrets && mount --bind {self.home}/istio /etc/istio && cd / && "
        role = ["proxy", self.role, "--domain", "shop.svc.cluster.local", "--proxyLogLevel=warning", "--proxyComponentLogLevel=misc:error",
                "--log_output_level=default:info"]
        line = " ".join(["exec setpriv --reuid=1337 --regid=1337 --clear-groups", agent, *role])
        log = open(self.home / "log", "w")
        self.process = subprocess.Popen(["ip", "netns", "exec", self.name, "unshare", "--mount", "sh", "-c", mounts + line],
                                        stdout=log, stderr=log, env=env)

    def log(self):
        return (self.home / "log").read_text()

    def curl(self, url, *more):
        return run(*self.inside("curl", "-s", "--max-time", "5", *more, url, user=1000)).stdout

    def status(self, url, *more):
        return self.curl(url, "-o", "/dev/null", "-w", "%{http_code}", "-H", "Host: reviews.shop.svc.cluster.local:9080", *more)

    def reached(self, url, *more):
        """From outside."""
        return self.node.curl(url, *more) if self.code(url, *more) == "200" else ""

    def code(self, url, *more):
        return self.node.curl(url, "-o", "/dev/null", "-w", "%{http_code}", *more)

    def admin(self, path):
        return run(*self.inside("curl", "-s", "--max-time", "5", f"http://127.0.0.1:15000{path}", user=1337)).stdout

    def is_ready(self):
        return run(*self.inside("curl", "-sf", "--max-time", "2", "http://127.0.0.1:15021/healthz/ready", user=1337)).returncode == 0

    def stop(self):
        """Whether it ends by itself."""
        self.process.send_signal(signal.SIGTERM)
        return eventually(lambda: self.process.poll() is not None, 20)
