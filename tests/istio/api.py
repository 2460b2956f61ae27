"""An API server without objects, which istiod wants to see even when it reads all configuration from files: lists are empty,
watches silent, what is created is kept, and nobody has a token."""
import http.server
import json
import re
import threading

KINDS = {"endpointslices": "EndpointSlice", "ingresses": "Ingress", "ingressclasses": "IngressClass", "configmaps": "ConfigMap",
         "customresourcedefinitions": "CustomResourceDefinition", "replicationcontrollers": "ReplicationController",
         "mutatingwebhookconfigurations": "MutatingWebhookConfiguration", "clustertrustbundles": "ClusterTrustBundle",
         "validatingwebhookconfigurations": "ValidatingWebhookConfiguration", "serviceaccounts": "ServiceAccount"}
KEPT = {}
# (namespace, account) to a token; None where nobody has one.
TOKENS = None


class Api(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def refuse(self, status, reason):
        self.answer(status, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": status,
                             "message": reason})

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/version":
            return self.answer(200, {"major": "1", "minor": "36", "gitVersion": "v1.36.3"})
        if path in ("/api", "/apis"):
            return self.answer(200, {"kind": "APIVersions", "versions": ["v1"]} if path == "/api" else
                               {"kind": "APIGroupList", "apiVersion": "v1", "groups": []})
        if path in KEPT:
            return self.answer(200, KEPT[path])
        if "watch=" in query:
            if "sendInitialEvents" in query:
                return self.refuse(422, "Invalid")
            return self.silent()
        parts = re.fullmatch(r"/(?:api|apis/([^/]+))/([^/]+)(?:/namespaces/[^/]+)?/([^/]+)", path)
        if not parts:
            return self.refuse(404, "NotFound")
        group, version, plural = parts.groups()
        kind = KINDS.get(plural, plural[:-1].capitalize()) + "List"
        api = f"{group}/{version}" if group else version
        if "PartialObjectMetadataList" in self.headers.get("accept", ""):
            kind, api = "PartialObjectMetadataList", "meta.k8s.io/v1"
        self.answer(200, {"kind": kind, "apiVersion": api, "metadata": {"resourceVersion": "1"}, "items": []})

    def silent(self):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        threading.Event().wait()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        account = re.fullmatch(r"/api/v1/namespaces/([^/]+)/serviceaccounts/([^/]+)/token", self.path.partition("?")[0])
        if account and TOKENS:
            return self.answer(201, {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {}, "spec": {"audiences": []},
                                     "status": {"token": TOKENS(*account.groups()), "expirationTimestamp": "2099-01-01T00:00:00Z"}})
        meta = body.setdefault("metadata", {})
        meta["resourceVersion"] = "1"
        if meta.get("name"):
            KEPT[f"{self.path.partition('?')[0]}/{meta['name']}"] = body
        self.answer(201, body)

    def do_PUT(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        KEPT[self.path.partition("?")[0]] = body
        self.answer(200, body)

    do_PATCH = do_PUT

    def log_message(self, *_):
        pass


def serve(address):
    server = http.server.ThreadingHTTPServer(address, Api)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def kubeconfig(url):
    return json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "none",
        "clusters": [{"name": "none", "cluster": {"server": url}}], "users": [{"name": "none", "user": {}}],
        "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}]})
