"""Cases that bytes in a table cannot say: a wrong upstream over HTTP/2, certificates, slow readers, full tables.

Each function takes the proxy and the origin and returns None or what went wrong; `Skip` where a proxy lacks the listener.
"""
import contextlib
import socket
import ssl
import subprocess
import threading
import time
import urllib.request

import h2
import proxies
import wire

ALL = []


class Skip(Exception):
    pass


def scenario(number, name):
    def keep(function):
        ALL.append((number, name, function))
        return function
    return keep


def run(function, proxy, server):
    server.begin({})
    try:
        return function(proxy, server)
    except Skip:
        return "skip"
    except OSError as e:
        return f"{type(e).__name__}: {e}"


def needs(proxy, listener):
    if listener not in proxy.ports:
        raise Skip


def remote(host, port):
    proxy = proxies.Proxy(host, {"http": port})
    proxy.address = lambda listener="http": (host, port)
    return proxy


# --- certificates ------------------------------------------------------------------------------------------------

GOOD = "subjectAltName=URI:spiffe://cluster.local/ns/a/sa/b\nextendedKeyUsage=clientAuth,serverAuth\n"


def instant(seconds):
    """A time so many seconds from now, as openssl writes it."""
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + seconds))


# A URI with a NUL in it cannot be written as text: the extension's DER in hexadecimal digits.
NUL = b"spiffe://cluster.local/ns/a/sa/b\0.evil"
NUL_URI = (bytes([0x30, len(NUL) + 2, 0x86, len(NUL)]) + NUL).hex(":").upper()
LEAVES = {
    "good": (GOOD, []),
    "nul-in-uri": (f"subjectAltName=DER:{NUL_URI}\nextendedKeyUsage=clientAuth\n", []),
    "server-only": (GOOD.replace("clientAuth,", ""), []),
    "unknown-critical": (GOOD + "1.2.3.4=critical,ASN1:UTF8String:x\n", []),
    "other-trust-domain": (GOOD.replace("cluster.local", "other.test"), []),
    "trailing-slash": (GOOD.replace("sa/b", "sa/b/"), []),
    "a-ca": (GOOD + "basicConstraints=critical,CA:TRUE\n", []),
    "no-san": ("extendedKeyUsage=clientAuth\n", []),
    "expired": (GOOD, ["-not_before", "20200101000000Z", "-not_after", "20200102000000Z"]),
    "not-yet": (GOOD, ["-not_before", "20900101000000Z", "-not_after", "20900102000000Z"]),
    "just-expired": (GOOD, ["-not_before", instant(-3600), "-not_after", instant(-120)]),
    "not-quite-yet": (GOOD, ["-not_before", instant(1800), "-not_after", instant(7200)]),
    "just-begun": (GOOD, ["-not_before", instant(-60), "-not_after", instant(3600)]),
    "self-signed": (GOOD, None),
}


def keys(home):
    """A CA, a server's certificate, and clients' of every kind that must be refused; by openssl."""
    made = home / "keys"
    made.mkdir()

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=made, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "ca.key", "-out",
            "ca.pem", "-subj", "/O=hostile", "-days", "30")
    (made / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
        "default_days=30\nunique_subject=no\ncertificate=ca.pem\nprivate_key=ca.key\n[p]\ncommonName=optional\n")
    (made / "index").write_text("")
    (made / "serial").write_text("1000\n")
    for name, (extensions, dates) in {**LEAVES, "server": ("subjectAltName=DNS:server.test\n", [])}.items():
        (made / f"{name}.ext").write_text(extensions)
        # The name is in the common name as well, where nobody may look for it.
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key", "-out",
                f"{name}.csr", "-subj", "/CN=spiffe:\\/\\/cluster.local\\/ns\\/a\\/sa\\/b")
        if dates is None:
            openssl("x509", "-req", "-in", f"{name}.csr", "-signkey", f"{name}.key", "-extfile", f"{name}.ext", "-out",
                    f"{name}.pem", "-days", "30")
        else:
            fixed = [{"-not_before": "-startdate", "-not_after": "-enddate"}.get(d, d) for d in dates]
            openssl("ca", "-batch", "-config", "ca.cnf", "-in", f"{name}.csr", "-out", f"{name}.pem", "-notext", "-extfile",
                    f"{name}.ext", *fixed)
    return made


def context(proxy, leaf):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if leaf:
        made.load_cert_chain(proxy.keys / f"{leaf}.pem", proxy.keys / f"{leaf}.key")
    return made


def asked_over_tls(proxy, leaf, name="server.test"):
    """The status of a GET, or the word of the refusal."""
    try:
        with socket.create_connection(proxy.address("tls"), wire.PATIENCE) as plain, \
                context(proxy, leaf).wrap_socket(plain, server_hostname=name) as stream:
            stream.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            return int(stream.recv(1000).split(b" ")[1])
    except (ssl.SSLError, ConnectionError, IndexError) as e:
        return f"refused ({type(e).__name__})"


def admission(leaf):
    @scenario(61, f"a client's certificate that is let in: {leaf}")
    def admitted(proxy, _):
        needs(proxy, "tls")
        got = asked_over_tls(proxy, leaf)
        return None if got == 200 else f"got {got}"


ADMITTED = ("good", "just-begun")
for name in ADMITTED:
    admission(name)


def refusal(number, leaf):
    @scenario(number, f"a client's certificate: {leaf or 'none at all'}")
    def refused(proxy, server):
        needs(proxy, "tls")
        before = stat(proxy, "ssl.fail_verify")
        got = asked_over_tls(proxy, leaf)
        if isinstance(got, int) or server.requests():
            return f"it was let in: {got}"
        return counted(proxy, "ssl.fail_verify", before)


for name in LEAVES:
    if name not in ADMITTED:
        refusal(60 if name == "nul-in-uri" else 61, name)
refusal(68, None)


def stat(proxy, name):
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy.ports['admin']}/stats?filter={name}") as answer:
        return sum(int(line.rpartition(b": ")[2]) for line in answer if line.strip())


def counted(proxy, name, before):
    """None once a count is above BEFORE: the peer may hear of a refusal a little earlier."""
    end = time.monotonic() + wire.PATIENCE
    while stat(proxy, name) <= before:
        if time.monotonic() > end:
            return f"no {name}… was counted"
        time.sleep(0.02)
    return None


@scenario(68, "plain HTTP to a TLS port ends, and is counted")
def plain_to_tls(proxy, server):
    needs(proxy, "tls")
    before = stat(proxy, "ssl.connection_error")
    with wire.Connection(proxy.address("tls")) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        if not client.closes() or server.requests():
            return "it was served, or stays open"
    return counted(proxy, "ssl.connection_error", before)


@scenario(68, "a TLS greeting to a plain port is answered with 400 or an end")
def tls_to_plain(proxy, server):
    with wire.Connection(proxy.address()) as client:
        client.send(hello(context(proxy, None) if hasattr(proxy, "keys") else ssl.create_default_context()))
        got = client.response()
        if got is not None and got.status != 400 or server.requests():
            return f"answered {got and got.status}"
        return None if client.closes() else "the connection stays open"


def hello(made):
    out = ssl.MemoryBIO()
    stream = made.wrap_bio(ssl.MemoryBIO(), out, server_hostname="server.test")
    with contextlib.suppress(ssl.SSLWantReadError):
        stream.do_handshake()
    return out.read()


def handshake_in_pieces(proxy, cut):
    """Does a TLS handshake whose first flight is cut by CUT; the status of a request inside."""
    incoming, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    stream = context(proxy, "good").wrap_bio(incoming, out, server_hostname="server.test")
    with wire.Connection(proxy.address("tls")) as client:
        first = True
        while True:
            try:
                stream.do_handshake()
                break
            except ssl.SSLWantReadError:
                for piece in cut(out.read()) if first else [out.read()]:
                    if not client.send(piece):
                        return "refused"
                first = False
                if not client.more():
                    return "refused"
                incoming.write(client.exactly(len(client.buffer)))
        stream.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.send(out.read())
        while client.more():
            incoming.write(client.exactly(len(client.buffer)))
            with contextlib.suppress(ssl.SSLWantReadError):
                return int(stream.read(100).split(b" ")[1])
        return "no answer"


@scenario(62, "a ClientHello of one-byte segments is understood")
def segments(proxy, _):
    needs(proxy, "tls")
    got = handshake_in_pieces(proxy, lambda data: [bytes([b]) for b in data])
    return None if got == 200 else f"got {got}"


@scenario(62, "a ClientHello in records of a few bytes is understood or refused")
def records(proxy, _):
    needs(proxy, "tls")
    def cut(data):
        body = data[5:]
        return [b"".join(data[:3] + len(body[i : i + 7]).to_bytes(2, "big") + body[i : i + 7] for i in range(0, len(body), 7))]
    got = handshake_in_pieces(proxy, cut)
    return None if got in (200, "refused") else f"got {got}"


@scenario(62, "a greeting of more than 64 KiB ends, with little memory")
def large_hello(proxy, _):
    needs(proxy, "tls")
    before = proxy.memory()
    with wire.Connection(proxy.address("tls")) as client:
        client.send(b"\x16\x03\x01\x40\x00\x01\x10\x00\x00" + b"\x03\x03" + b"\0" * 16378)
        for _ in range(80):
            if not client.send(b"\x16\x03\x01\x40\x00" + b"\0" * 16384):
                break
        if not client.closes():
            return "the connection stays open"
    grown = proxy.memory() - before
    return None if grown < 2048 else f"memory grew by {grown} kB"


@scenario(62, "a greeting that stops ends")
def half_hello(proxy, _):
    needs(proxy, "tls")
    with wire.Connection(proxy.address("tls")) as client:
        client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        # The listener filters' time limit, or the transport socket's of 10 s.
        return None if client.closes(20) else "the connection stays open"


@scenario(63, "TLS 1.1 is refused")
def old_version(proxy, _):
    needs(proxy, "tls")
    body = b"\x03\x02" + b"\x11" * 32 + b"\0" + b"\0\x04\xc0\x13\x00\x2f" + b"\x01\0" + b"\0\0"
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    with wire.Connection(proxy.address("tls")) as client:
        client.send(b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message)
        first = client.exactly(1)
        # An alert, or the end; a ServerHello would be a handshake record.
        return None if first in (b"\x15", b"") and client.closes() else f"answered with record {first!r}"


# --- a server that speaks HTTP/2 -----------------------------------------------------------------------------------

class Http2Origin:
    """An HTTP/2 server of one connection at a time for each client; `behave` is called for every request, `went` for every
    stream that is reset and, without a stream, for every connection that ends. `known` counts the connections whose client
    knows the settings."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open = []
        self.begin(None)
        threading.Thread(target=self.accept, daemon=True).start()

    def begin(self, behave, settings=b"", went=None):
        """Ends the connections of the case before: the next one's begin anew, with its settings."""
        for stream in self.open:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        self.behave, self.settings, self.went, self.connections, self.open = behave, settings, went, 0, []
        self.known = 0

    def accept(self):
        while True:
            stream, _ = self.listener.accept()
            self.connections += 1
            self.open.append(stream)
            threading.Thread(target=self.serve, args=(stream, self.connections), daemon=True).start()

    def serve(self, stream, connection):
        went = self.went or (lambda *_: None)
        with contextlib.suppress(OSError), stream:
            self.converse(stream, connection, went)
        went(connection)

    def converse(self, stream, connection, went):
        buffer = b""
        stream.sendall(h2.frame(h2.SETTINGS, 0, 0, self.settings))
        while True:
            while len(buffer) < 24 and h2.PREFACE.startswith(buffer[:24]) or len(buffer) < 9 or \
                    len(buffer) < 9 + int.from_bytes(buffer[:3], "big"):
                got = stream.recv(1 << 16)
                if not got:
                    return
                buffer += got
                if buffer.startswith(h2.PREFACE):
                    buffer = buffer[len(h2.PREFACE):]
            size, kind, flags = int.from_bytes(buffer[:3], "big"), buffer[3], buffer[4]
            number = int.from_bytes(buffer[5:9], "big")
            buffer = buffer[9 + size :]
            if kind == h2.SETTINGS and not flags & h2.ACK:
                stream.sendall(h2.frame(h2.SETTINGS, h2.ACK, 0))
            elif kind == h2.SETTINGS:
                self.known += 1
            elif kind == h2.PING and not flags & h2.ACK:
                stream.sendall(h2.frame(h2.PING, h2.ACK, 0, b"\0" * 8))
            elif kind == h2.HEADERS:
                self.behave(stream, connection, number)
            elif kind == h2.RST_STREAM:
                went(connection, number)


def answer(stream, number):
    stream.sendall(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number, b"\x88"))


def goaway(stream, last, code=0):
    stream.sendall(h2.frame(h2.GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big")))


def ask_all(proxy, n):
    """N requests at once over one HTTP/2 connection to the proxy; how each ended."""
    with h2.Client(proxy.address("h2up")) as client:
        client.read(lambda: client.frames > 0)
        client.do([{"request": f"/{i}"} for i in range(n)])
        client.settle([str(2 * i + 1) for i in range(n)])
        return [client.streams.get(str(2 * i + 1), "nothing") for i in range(n)]


@scenario(52, "an upstream that says GOAWAY and then allows no streams")
def goaway_and_none(proxy, _):
    needs(proxy, "h2up")
    def behave(stream, connection, number):
        if connection == 1:
            goaway(stream, 0)
            stream.sendall(h2.frame(h2.SETTINGS, 0, 0, bytes.fromhex("000300000000")))
        else:
            answer(stream, number)
    proxy.http2_origin.begin(behave)
    got = ask_all(proxy, 3)
    return None if got == ["200"] * 3 and proxy.alive() else f"got {got}"


@scenario(58, "streams above GOAWAY's last are sent again, the others end")
def race(proxy, _):
    needs(proxy, "h2up")
    seen = []
    def behave(stream, connection, number):
        if connection == 1:
            seen.append(number)
            if len(seen) == 4:
                goaway(stream, seen[1])
                answer(stream, seen[0])
                answer(stream, seen[1])
        else:
            answer(stream, number)
    proxy.http2_origin.begin(behave)
    got = ask_all(proxy, 4)
    return None if got == ["200"] * 4 else f"got {got}"


@scenario(59, "the 101st long stream of a peer that allows 100")
def many_streams(proxy, _):
    needs(proxy, "h2up")
    waiting, lock = [], threading.Lock()
    def behave(stream, connection, number):
        with lock:
            if connection == 1 and number == 1:
                return answer(stream, number)
            waiting.append((stream, number))
            if len(waiting) < 101:
                return
            for s, n in waiting:
                answer(s, n)
    proxy.http2_origin.begin(behave, bytes.fromhex("000300000064"))
    # A first request, so that the limit is known.
    results = ask_all(proxy, 1)
    def half(n):
        results.extend(ask_all(proxy, n))
    threads = [threading.Thread(target=half, args=(n,)) for n in (60, 41)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [r for r in results if r != "200"]
    if not failed and proxy.http2_origin.connections < 2:
        return "100 streams were allowed, and 101 went over one connection"
    return None if not [f for f in failed if f != "503"] else f"{len(failed)} failed: {sorted(set(failed))}"


# --- slow and strange peers ----------------------------------------------------------------------------------------

@scenario(29, "a reader that does not read a body of 100 MB")
def slow_reader(proxy, server):
    if not proxy.process:
        raise Skip
    server.begin({"answer": "HTTP/1.1 200 OK\r\nContent-Length: 104857600\r\n\r\n", "padding": "x" * 1048576, "paddings": 100})
    before = proxy.memory()
    with wire.Connection(proxy.address()) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        client.until(b"\r\n\r\n")
        grown = 0
        for _ in range(20):
            grown = max(grown, proxy.memory() - before)
            time.sleep(0.02)
    return None if grown < 8192 else f"memory grew by {grown} kB"


@scenario(50, "a window that opens a byte at a time on a body of 100 MB")
def drip(proxy, server):
    if not proxy.process:
        raise Skip
    server.begin({"answer": "HTTP/1.1 200 OK\r\nContent-Length: 104857600\r\n\r\n", "padding": "x" * 1048576, "paddings": 100})
    before = proxy.memory()
    grown = 0
    with h2.Client(proxy.address(), bytes.fromhex("000400000001")) as client:
        client.do([{"request": "/", "stream": 1}])
        client.read(lambda: "1" in client.data)
        for _ in range(200):
            if not client.send(h2.frame(h2.WINDOW_UPDATE, 0, 1, b"\0\0\0\x01")):
                break
            client.drain()
            grown = max(grown, proxy.memory() - before)
    return None if grown < 8192 else f"memory grew by {grown} kB"


@scenario(77, "a server that speaks first is heard at once")
def server_first(proxy, server):
    needs(proxy, "tcp")
    server.begin({"first": "220 ready\r\n"})
    begun = time.monotonic()
    with wire.Connection(proxy.address("tcp")) as client:
        if client.until(b"\r\n") != b"220 ready":
            return "its greeting did not come"
    took = time.monotonic() - begun
    return None if took < 2 else f"it took {took:.1f} s"


@scenario(76, "a connection whose peers are silent ends, and its place is free again")
def silent(proxy, server):
    needs(proxy, "tcp")
    with wire.Connection(proxy.address("tcp")) as client:
        if not client.closes():
            return "it stays open beyond its idle timeout"
    return None


@scenario(44, "a flood does not slow the others down for long")
def flood_beside_others(proxy, _):
    stop, slow = threading.Event(), []
    def others():
        while not stop.is_set():
            begun = time.monotonic()
            with wire.Connection(proxy.address()) as client:
                client.send(b"GET /marker-0 HTTP/1.1\r\nHost: a\r\n\r\n")
                got = client.response()
            if got is None or got.status != 200 or time.monotonic() - begun > 5:
                slow.append(got and got.status)
    other = threading.Thread(target=others)
    other.start()
    for _ in range(5):
        with h2.Client(proxy.address()) as client:
            client.do([{"repeat": 20000, "steps": [{"request": "/"}, {"frame": "RST_STREAM", "hex": "00000008"}]}])
    stop.set()
    other.join()
    return None if not slow else f"{len(slow)} others failed or waited for more than 5 s"
