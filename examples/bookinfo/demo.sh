#!/bin/sh
# Bookinfo in a mesh, shown step by step; with --check, every step is an assertion and the mesh ends with it.
#
# OUTRIGGER names the program (default: target/release/outrigger, else outrigger in PATH).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
check=
for arg in "$@"; do
    case $arg in
        --check) check=yes ;;
        *) echo "usage: demo.sh [--check]" >&2; exit 2 ;;
    esac
done
outrigger=${OUTRIGGER:-$here/../../target/release/outrigger}
[ -x "$outrigger" ] || outrigger=$(command -v outrigger || true)
[ -x "$outrigger" ] || { echo "demo: no outrigger program: build it (cargo build --release), or set OUTRIGGER" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "demo: namespaces need root: run this as root (sudo)" >&2; exit 1; }

if [ -n "$check" ]; then
    # Beside a mesh that may be running already.
    OUTRIGGER_STATE=/run/outrigger/check-$$
    export OUTRIGGER_STATE
fi
# The folder is edited further down: a copy, so that the repository stays as it is.
folder=$(mktemp -d)
cp "$here"/*.yaml "$folder"

finish() {
    status=$?
    trap - EXIT INT TERM
    if [ "$status" != 0 ] && [ -n "${started:-}" ]; then
        "$outrigger" local ps >&2 || true
        echo "demo: failed; the last lines of the control plane and of productpage's proxy:" >&2
        "$outrigger" local logs istiod -n istio-system --tail 10 >&2 || true
        "$outrigger" local logs productpage-v1 -c istio-proxy --tail 10 >&2 || true
    fi
    "$outrigger" local down 2>/dev/null || true
    rm -rf "$folder"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }
show() { printf '$ %s\n' "$*"; "$@"; }
fail() { echo "demo: $*" >&2; exit 1; }
# The value of a whole number in a line of JSON.
number() { printf '%s' "$2" | grep -o "\"$1\":[0-9]*" | head -n 1 | cut -d: -f2 || true; }

say "Start the mesh: every pod a network namespace with its own sidecar, from $here"
started=yes
"$outrigger" local up -f "$folder" --wait 240

gateway=$("$outrigger" local ps | sed -n 's|^\(http://[0-9.:]*\) -> istio-ingressgateway.istio-system port 80 .*|\1|p')
[ -n "$gateway" ] || fail "the gateway has no port on this machine"

say "Ask for the page through the gateway"
page=$(curl -sS --max-time 10 "$gateway/productpage")
printf '$ curl %s/productpage\n' "$gateway"
printf '%s\n' "$page" | grep -E '<title>|<h1>|Reviews served|<u>|<small>|Publisher'
printf '%s' "$page" | grep -q '<title>Simple Bookstore App</title>' || fail "the page is not the bookstore's"
printf '%s' "$page" | grep -q 'Error fetching' && fail "the page lacks a part"

say "Reviews are split over three versions"
split=$("$outrigger" call -n 90 --summary "$gateway/api/v1/products/0/reviews")
printf '%s\n' "$split"
[ "$(number 200 "$split")" = 90 ] || fail "not every request succeeded"
for version in v1 v2 v3; do
    n=$(number "reviews-$version" "$split")
    [ "${n:-0}" -ge 10 ] || fail "reviews-$version answered ${n:-0} of 90 requests"
done

say "What the proxy of a reviews pod does with what comes in"
rows=$("$outrigger" pc listeners reviews-v1.default --port 15006)
printf '$ outrigger pc listeners reviews-v1 --port 15006\n%s\n' "$rows"
printf '%s' "$rows" | grep -q 'inbound|9080||' || fail "port 9080 of reviews-v1 has no inbound cluster"

say "Every process, its user, address and network namespace"
show "$outrigger" local ps

say "The interception rules of that pod, and how often each was met"
pid=$("$outrigger" local ps | awk '$2 == "reviews-v1" && $3 == "istio-proxy" { print $5; exit }')
[ -n "$pid" ] || fail "reviews-v1 has no istio-proxy process"
rules=$(nsenter -n --target "$pid" iptables -t nat -L -v)
printf '$ nsenter -n --target %s iptables -t nat -L -v\n%s\n' "$pid" "$rules"
met=$(printf '%s' "$rules" | awk '/Chain ISTIO_IN_REDIRECT/ { c = 1 } c && $3 == "REDIRECT" { print $1; exit }')
[ "${met:-0}" != 0 ] || fail "no connection met ISTIO_IN_REDIRECT"

say "Every hop is mutual TLS: who that pod is, and what a caller without a certificate gets"
own=$(nsenter -n --target "$pid" curl -sS http://127.0.0.1:15000/certs | grep -o 'spiffe://[^"]*/sa/[^"]*' | head -n 1 || true)
printf '%s\n' "$own"
[ "$own" = spiffe://cluster.local/ns/default/sa/bookinfo-reviews ] || fail "the proxy of reviews-v1 has no certificate of its own"
address=$("$outrigger" local ps | awk '$2 == "reviews-v1" && $3 == "istio-proxy" { print $7; exit }')
plain=$("$outrigger" local exec -n istio-system istiod -- outrigger call "http://$address:9080/health" --timeout 5 || true)
printf '$ outrigger local exec -n istio-system istiod -- outrigger call http://%s:9080/health\n%s\n' "$address" "$plain"
printf '%s' "$plain" | grep -q '"status":200' && fail "a caller without a certificate is served"

say "One request in the logs of both sidecars, with one request id"
id=demo-$$
curl -sS --max-time 10 -o /dev/null -H "x-request-id: $id" "$gateway/productpage" || fail "the page did not come"
i=0
while :; do
    from=$("$outrigger" local logs productpage-v1 -c istio-proxy | grep "outbound|9080|.*reviews" | tail -n 1 || true)
    request_id=$(printf '%s' "$from" | grep -oE '"[0-9a-f]{8}-[0-9a-f-]{27}"|"demo-[0-9]+"' | head -n 1 || true)
    if [ -n "$request_id" ]; then
        to=$(for v in v1 v2 v3; do "$outrigger" local logs reviews-$v -c istio-proxy | grep -F "$request_id" | grep 'inbound|9080||' || true; done | tail -n 1)
        [ -z "$to" ] || break
    fi
    i=$((i + 1))
    [ $i -lt 50 ] || fail "no request id stands in the access logs of productpage and reviews"
    sleep 0.1
done
printf 'productpage: %s\nreviews:     %s\n' "$from" "$to"

say "gRPC, one answer and a stream; the application sees its own sidecar as the caller"
grpc=$("$outrigger" local exec -n grpc client -- outrigger call grpc://server-svc.grpc:8080 -d hello)
printf '%s\n' "$grpc"
printf '%s' "$grpc" | grep -q '"peer":"127.0.0.6"' || fail "the gRPC server does not see 127.0.0.6"
grpc=$("$outrigger" local exec -n grpc client -- outrigger call grpc://server-svc.grpc:8080 -d hello --stream 3)
printf '%s\n' "$grpc"
printf '%s' "$grpc" | grep -q '"number":3' || fail "the stream ended early"

say "Edit $folder/reviews.yaml: nine of ten requests to v3"
cat > "$folder/.reviews.new" <<'YAML'
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: reviews
spec:
  hosts:
  - reviews
  http:
  - route:
    - destination:
        host: reviews
        subset: v3
      weight: 90
    - destination:
        host: reviews
        subset: v1
      weight: 10
YAML
mv "$folder/.reviews.new" "$folder/reviews.yaml"
sleep 1
split=$("$outrigger" call -n 200 --summary "$gateway/api/v1/products/0/reviews")
printf '%s\n' "$split"
n=$(number reviews-v3 "$split")
[ "${n:-0}" -ge 150 ] || fail "reviews-v3 answered ${n:-0} of 200 requests, which is less than 150"
[ "$(number 200 "$split")" = 200 ] || fail "not every request succeeded"

if [ -n "$check" ]; then
    say "Every check passed"
    exit 0
fi
say "The mesh stays up: $gateway/productpage (Ctrl-C ends it)"
printf 'Edit %s, or ask it: outrigger local ps | exec | logs, outrigger pc …\n' "$folder"
while :; do sleep 3600 & wait $!; done
