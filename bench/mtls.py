"""TLS scenarios of the bench, and the pair of sidecars.

`mtls-pair`: client -> proxy -> mutual TLS -> proxy -> server; `pair`: the same with plain HTTP between the two, beside the
path with no proxy at all. Both proxies of a pair share one core, and `cpu_per_request` is the sum of both.
`handshakes` and `handshakes-resumed`: connections a second with client certificates, four `openssl s_time` at once on the
other core; `cpu_per_request` is the proxy's time for each. `idle-10k-tls`: 10,000 connections that rest behind a TLS
listener. Certificates are ECDSA P-256 and made for the run; the proxies are configured alike.
"""
import re
import ssl
import subprocess
import time

import tcp

TYPE = "type.googleapis.com/envoy.extensions."


def certificates(work):
    """A CA and one certificate that both sides use, by openssl."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=work, check=True, capture_output=True)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/O=bench", "-days", "2")
    openssl("req", *curve, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/O=bench")
    (work / "leaf.ext").write_text("subjectAltName=URI:spiffe://cluster.local/ns/a/sa/b,DNS:bench.test\n"
                                   "extendedKeyUsage=clientAuth,serverAuth\n")
    openssl("x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "leaf.ext",
            "-out", "leaf.pem", "-days", "2")


def tls_context(work, side):
    common = {
        "tls_certificates": [{"certificate_chain": {"filename": f"{work}/leaf.pem"},
                              "private_key": {"filename": f"{work}/leaf.key"}}],
        "validation_context": {"trusted_ca": {"filename": f"{work}/ca.pem"}, "match_typed_subject_alt_names": [
            {"san_type": "URI", "matcher": {"exact": "spiffe://cluster.local/ns/a/sa/b"}}]},
    }
    context = {"@type": f"{TYPE}transport_sockets.tls.v3.{side}TlsContext", "common_tls_context": common}
    if side == "Downstream":
        context["require_client_certificate"] = True
    else:
        context["sni"] = "bench.test"
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def scenarios(run):
    """The scenarios by name; `run` is the bench program."""

    class Half(run.Peer):
        """One proxy of a pair, or the server's end alone: `server` takes TLS, `client` speaks it to the upstream."""

        def __init__(self, name, work, upstream, part="in", server=False, client=False, stream=False):
            self.work, self.server, self.client, self.stream = work, server, client, stream
            (work / part).mkdir(exist_ok=True)
            super().__init__(name, work / part, upstream)

        def config(self, listen, admin, clusters, filler):
            config = tcp.v3_config(listen, admin, clusters[0], True) if self.stream else run.v3_config(
                listen, admin, clusters, filler)
            static = config["static_resources"]
            if self.server:
                static["listeners"][0]["filter_chains"][0]["transport_socket"] = tls_context(self.work, "Downstream")
            if self.client:
                static["clusters"][0]["transport_socket"] = tls_context(self.work, "Upstream")
            return config

    class Pair:
        """Two proxies, one behind the other."""

        def __init__(self, name, work, upstream, secure):
            self.name = name
            inner = Half(name, work, upstream, "in", server=secure)
            self.halves = [inner, Half(name, work, inner.port, "out", client=secure)]
            self.port = self.halves[1].port

        def cpu(self):
            return sum(h.cpu() for h in self.halves)

        def rss(self):
            return sum(h.rss() for h in self.halves)

        def stop(self):
            for half in self.halves:
                half.stop()

    class Nothing:
        """No proxy at all."""

        def __init__(self, upstream):
            self.name, self.port = "none", upstream

        def cpu(self):
            return 0

        def stop(self):
            pass

    def pair(secure):
        def scenario(options, work):
            certificates(work)
            samples = {}
            with run.origin(work, 128) as upstream:
                peers = [Pair(n, work, upstream, secure) for n in ("outrigger", "envoy")] + [Nothing(upstream)]
                try:
                    for p in peers:
                        run.load(work, p.port, 64, 1)
                    for _ in range(options.rounds):
                        for p in peers:
                            before = p.cpu()
                            result = run.load(work, p.port, 64, options.seconds)
                            if p.name != "none":
                                result["cpu_per_request"] = (p.cpu() - before) / 1000 / max(result["requests"], 1)
                                result["rss"] = p.rss()
                            samples.setdefault(p.name, []).append(result)
                finally:
                    for p in peers:
                        p.stop()
            return samples
        return scenario

    def handshakes(resumed):
        def scenario(options, work):
            certificates(work)
            samples = {}
            # TLS 1.2 for resumption: s_time ends before the tickets of 1.3 have come.
            mode = ["-reuse", "-tls1_2"] if resumed else ["-new"]
            with run.origin(work, 128) as upstream:
                peers = [Half(n, work, upstream, server=True) for n in ("outrigger", "envoy")]
                try:
                    for _ in range(options.rounds):
                        for p in peers:
                            before, begun = p.cpu(), time.monotonic()
                            command = ["taskset", "-c", run.LOAD_CORE, "openssl", "s_time", "-connect", f"127.0.0.1:{p.port}",
                                       "-cert", f"{work}/leaf.pem", "-key", f"{work}/leaf.key", "-CAfile", f"{work}/ca.pem",
                                       "-time", str(options.seconds), *mode]
                            runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                                    for _ in range(4)]
                            outs = [r.communicate()[0] for r in runs]
                            # s_time sees only whole seconds of its clock, so that it runs for up to one more.
                            took = time.monotonic() - begun
                            count = sum(int(re.search(r"(\d+) connections in \d+ real seconds", o)[1]) for o in outs)
                            samples.setdefault(p.name, []).append({
                                "connections_per_second": count / took,
                                "cpu_per_request": (p.cpu() - before) / 1000 / max(count, 1)})
                finally:
                    for p in peers:
                        p.stop()
            return samples
        return scenario

    def idle(_, work):
        certificates(work)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(work / "leaf.pem", work / "leaf.key")
        return tcp.resting(("outrigger", "envoy"), lambda name, port: Half(name, work, port, server=True, stream=True),
                           context.wrap_socket)

    return {"pair": pair(False), "mtls-pair": pair(True), "handshakes": handshakes(False),
            "handshakes-resumed": handshakes(True), "idle-10k-tls": idle}
