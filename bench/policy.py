"""Policy scenarios of the bench: RBAC with 1, 100 and 1,000 policies, and JWTs that are known or new.

`policies-N`: N ALLOW policies in the shape that istiod gives them (a caller and a path each), of which the last lets the
request in. `jwt-cached`: the same RS256 token with every request, with a token cache in both proxies; `jwt-first`: 1,000
tokens in turn, more than either cache holds, so that each signature is checked. `cpu_added` is what a request costs more
than through the same proxy without the filters, measured in the same round.
"""
import base64
import json
import re
import subprocess
import sys
import time

FILTERS = "type.googleapis.com/envoy.extensions.filters.http"


def scenarios(run):
    """The scenarios by name; `run` is the bench program."""

    class PolicyPeer(run.Peer):
        def __init__(self, name, work, upstream, filters):
            self.filters = filters
            # The file is named after the filler: with and without filters are two files.
            super().__init__(name, work, upstream, filler=0 if filters else 1)

        def config(self, listen, admin, clusters, filler=0):
            config = run.v3_config(listen, admin, clusters)
            manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
            manager["http_filters"][:0] = self.filters
            return config

    def rbac(count):
        def policy(path, principal):
            return {"permissions": [{"and_rules": {"rules": [{"or_rules": {"rules": [{"url_path": {"path": {"exact": path}}}]}}]}}],
                    "principals": [{"and_ids": {"ids": [principal]}}]}
        caller = lambda n: {"or_ids": {"ids": [{"authenticated": {"principal_name": {
            "exact": f"spiffe://cluster.local/ns/n{n}/sa/client"}}}]}}
        policies = {f"ns[n{n}]-policy[p]-rule[0]": policy(f"/service-{n}", caller(n)) for n in range(count - 1)}
        policies["ns[zz]-policy[p]-rule[0]"] = policy("/", {"any": True})
        return [{"name": "rbac", "typed_config": {"@type": f"{FILTERS}.rbac.v3.RBAC",
                                                  "rules": {"action": "ALLOW", "policies": policies}}}]

    def openssl(*arguments, data=b""):
        return subprocess.run(["openssl", *arguments], input=data, check=True, capture_output=True).stdout

    def encode(data):
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    def tokens(work, count):
        """So many tokens, and the key set that they are good under."""
        key = work / "issuer.pem"
        key.write_bytes(openssl("genrsa", "2048"))
        modulus = openssl("rsa", "-in", str(key), "-noout", "-modulus").decode().strip().split("=")[1]
        jwks = {"keys": [{"kty": "RSA", "kid": "k", "alg": "RS256", "n": encode(bytes.fromhex(modulus)), "e": "AQAB"}]}
        head = encode(json.dumps({"alg": "RS256", "typ": "JWT", "kid": "k"}).encode())
        made = []
        for n in range(count):
            claims = {"iss": "https://issuer.example", "sub": f"user-{n}", "aud": ["bench"], "iat": int(time.time()),
                      "exp": int(time.time()) + 86400, "groups": ["users", "admins"], "scope": "read write"}
            signed = f"{head}.{encode(json.dumps(claims).encode())}"
            made.append(f"{signed}.{encode(openssl('dgst', '-sha256', '-sign', str(key), data=signed.encode()))}")
        return made, json.dumps(jwks)

    def jwt(jwks, cached):
        provider = {"issuer": "https://issuer.example", "audiences": ["bench"], "payload_in_metadata": "payload",
                    "local_jwks": {"inline_string": jwks}}
        if cached:
            provider["jwt_cache_config"] = {"jwt_cache_size": 100}
        return [{"name": "jwt", "typed_config": {
            "@type": f"{FILTERS}.jwt_authn.v3.JwtAuthentication", "providers": {"i": provider},
            "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "i"}}]}}]

    def load(work, port, sent, connections, seconds):
        script, listed = work / "policy.lua", work / "tokens"
        listed.write_text("".join(f"{t}\n" for t in sent))
        script.write_text(f"""
local requests, at = {{}}, 0
init = function()
  for line in io.lines("{listed}") do
    requests[#requests + 1] = wrk.format("GET", "/", {{Host = "bench", Authorization = "Bearer " .. line}})
  end
  if #requests == 0 then requests[1] = wrk.format("GET", "/") end
end
request = function() at = at % #requests + 1 return requests[at] end
{run.WRK_REPORT}""")
        out = subprocess.run(["taskset", "-c", run.LOAD_CORE, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s",
                              str(script), f"http://127.0.0.1:{port}/"], check=True, capture_output=True, text=True).stdout
        requests, duration, p50, p99, p999, errors = map(int, re.search(r"RESULT (.*)", out)[1].split())
        if errors:
            print(f"  {errors} errors of {requests} requests", file=sys.stderr)
        return {"requests": requests, "rps": requests / (duration / 1e6), "p50": p50, "p99": p99, "p999": p999, "errors": errors}

    def scenario(prepare):
        def measure(options, work):
            filters, sent = prepare(work)
            samples = {}
            with run.origin(work) as upstream:
                peers = [(PolicyPeer(name, work, upstream, filters), PolicyPeer(name, work, upstream, []))
                         for name in ("outrigger", "envoy")]
                try:
                    for peer in (p for pair in peers for p in pair):
                        load(work, peer.port, sent, 64, 1)
                    for _ in range(options.rounds):
                        for pair in peers:
                            results = []
                            for peer in pair:
                                before = peer.cpu()
                                result = load(work, peer.port, sent, 64, options.seconds)
                                result["cpu_per_request"] = (peer.cpu() - before) / 1000 / max(result["requests"], 1)
                                result["rss"] = peer.rss()
                                results.append(result)
                            checked, plain = results
                            checked["cpu_added"] = checked["cpu_per_request"] - plain["cpu_per_request"]
                            samples.setdefault(pair[0].name, []).append(checked)
                finally:
                    for peer in (p for pair in peers for p in pair):
                        peer.stop()
            return samples
        return measure

    def with_tokens(count, cached):
        def prepare(work):
            sent, jwks = tokens(work, count)
            return jwt(jwks, cached), sent
        return prepare

    all_of_them = {f"policies-{count}": scenario(lambda _, count=count: (rbac(count), [])) for count in (1, 100, 1000)}
    all_of_them["jwt-cached"] = scenario(with_tokens(1, True))
    all_of_them["jwt-first"] = scenario(with_tokens(1000, False))
    return all_of_them
