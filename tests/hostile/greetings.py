"""Cases of a TLS greeting that is unusual or wrong, and of what a handshake may not allow."""
import contextlib
import ssl
import struct
import subprocess
import threading
import time

import wire
from scenarios import asked_over_tls, context, hello, needs, scenario

SERVER_NAME, GROUPS, ALPN, VERSIONS, EARLY_DATA = 0, 10, 16, 43, 42
HANDSHAKE, ALERT, SERVER_HELLO = b"\x16", b"\x15", 2
NO_APPLICATION_PROTOCOL = 120


def vector(data, size):
    return len(data).to_bytes(size, "big") + data


class Greeting:
    """A ClientHello taken apart: what a case changes is put together again."""

    def __init__(self, data):
        body = data[9:]
        at = 34
        self.head, self.session = body[:at], body[at + 1 : at + 1 + body[at]]
        at += 1 + body[at]
        size = struct.unpack_from(">H", body, at)[0]
        self.ciphers = body[at + 2 : at + 2 + size]
        at += 2 + size + 1 + body[at + 2 + size] + 2
        self.extensions = []
        while at < len(body):
            kind, size = struct.unpack_from(">HH", body, at)
            self.extensions.append((kind, body[at + 4 : at + 4 + size]))
            at += 4 + size

    def replace(self, kind, change):
        self.extensions = [(k, change(v) if k == kind else v) for k, v in self.extensions]

    def bytes(self):
        extensions = b"".join(struct.pack(">H", k) + vector(v, 2) for k, v in self.extensions)
        body = self.head + vector(self.session, 1) + vector(self.ciphers, 2) + b"\x01\0" + vector(extensions, 2)
        message = b"\x01" + vector(body, 3)
        return b"".join(b"\x16\x03\x01" + vector(message[i : i + 16384], 2) for i in range(0, len(message), 16384))


def greeting(proxy, **of):
    made = context(proxy, None)
    for name, value in of.items():
        setattr(made, name, value)
    return Greeting(hello(made))


def reply(proxy, data):
    """The first record of the answer to some bytes: its type and its content, both empty at an end without one."""
    with wire.Connection(proxy.address("tls")) as client:
        client.send(data)
        head = client.exactly(5)
        return head[:1], client.exactly(int.from_bytes(head[3:5], "big")) if len(head) == 5 else b""


def refused(proxy, data):
    """None when the bytes are answered with an alert that ends the connection, or just with its end."""
    with wire.Connection(proxy.address("tls")) as client:
        client.send(data)
        first = client.exactly(1)
        return None if first in (ALERT, b"") and client.closes() else f"answered with a record of type {first!r}"


def is_server_hello(kind, content):
    return kind == HANDSHAKE and content[:1] == bytes([SERVER_HELLO])


# --- greetings -----------------------------------------------------------------------------------------------------

@scenario(62, "a greeting with GREASE everywhere is understood")
def grease(proxy, _):
    needs(proxy, "tls")
    made = greeting(proxy)
    made.ciphers = b"\x0a\x0a" + made.ciphers
    made.replace(GROUPS, lambda v: vector(b"\x1a\x1a" + v[2:], 2))
    made.replace(VERSIONS, lambda v: vector(b"\x2a\x2a" + v[1:], 1))
    made.extensions = [(0x3A3A, b""), (ALPN, vector(vector(b"\x4a\x4a", 1) + vector(b"http/1.1", 1), 2)), *made.extensions,
                       (0x5A5A, b"\0")]
    kind, content = reply(proxy, made.bytes())
    return None if is_server_hello(kind, content) else f"answered with {kind!r} {content[:8].hex()}"


@scenario(62, "a greeting without a server's name is understood")
def no_name(proxy, _):
    needs(proxy, "tls")
    got = asked_over_tls(proxy, "good", name=None)
    return None if got == 200 else f"got {got}"


@scenario(62, "a protocol that is not offered is left out, or refused by its own alert")
def other_protocol(proxy, _):
    needs(proxy, "tls")
    made = greeting(proxy)
    made.extensions.append((ALPN, vector(vector(b"no-such", 1), 2)))
    kind, content = reply(proxy, made.bytes())
    if is_server_hello(kind, content) or kind == ALERT and content == bytes([2, NO_APPLICATION_PROTOCOL]):
        return None
    return f"answered with {kind!r} {content[:8].hex()}"


def spoiled(name, change):
    @scenario(62, f"a greeting with {name} is refused")
    def scene(proxy, _):
        needs(proxy, "tls")
        made = greeting(proxy)
        change(made)
        return refused(proxy, made.bytes())


def adds(kind, value):
    return lambda made: made.extensions.append((kind, value))


spoiled("an empty protocol", adds(ALPN, vector(vector(b"", 1), 2)))
spoiled("no protocol in its list", adds(ALPN, vector(b"", 2)))
spoiled("a protocol longer than its list", adds(ALPN, vector(b"\xffh2", 2)))
spoiled("a list of protocols longer than itself", adds(ALPN, b"\xff\xff\x02h2"))
spoiled("one extension twice", lambda made: made.extensions.extend([(0x3A3A, b""), (0x3A3A, b"")]))
spoiled("a name longer than its list", lambda made: made.replace(SERVER_NAME, lambda v: v[:3] + b"\xff\xff" + v[5:]))
spoiled("a name with a NUL in it", lambda made: made.replace(
    SERVER_NAME, lambda _: vector(b"\0" + vector(b"server.test\0.evil", 2), 2)))
spoiled("no cipher", lambda made: setattr(made, "ciphers", b""))
spoiled("half a cipher", lambda made: setattr(made, "ciphers", made.ciphers + b"\x13"))


@scenario(62, "a hundred greetings of 60 KiB that stop hold 64 KiB each at most")
def many_halves(proxy, _):
    needs(proxy, "tls")
    made = greeting(proxy)
    made.extensions.append((0x3A3A, b"\0" * 60000))
    data = made.bytes()[:-100]
    before, clients, grown = proxy.memory(), [], 0
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            clients.append(stack.enter_context(wire.Connection(proxy.address("tls"))))
            clients[-1].send(data)
        # The listener filters' time limit is a second.
        end = time.monotonic() + 1
        while time.monotonic() < end:
            grown = max(grown, proxy.memory() - before)
            time.sleep(0.02)
        if not all(client.closes(20) for client in clients):
            return "a connection stays open"
    return None if grown <= 6400 else f"memory grew by {grown} kB"


# --- what a handshake may not allow --------------------------------------------------------------------------------

@scenario(63, "data before the handshake's end are not taken")
def early_data(proxy, server):
    needs(proxy, "tls")
    made = greeting(proxy)
    made.extensions.append((EARLY_DATA, b""))
    request = b"GET /early HTTP/1.1\r\nHost: a\r\n\r\n"
    kind, content = reply(proxy, made.bytes() + b"\x17\x03\x03" + vector(request, 2))
    if server.requests():
        return "the request came to the server"
    return None if is_server_hello(kind, content) or kind in (ALERT, b"") else f"answered with a record of type {kind!r}"


def openssl(proxy, *arguments, say=()):
    """What openssl s_client prints; SAY are the lines that it is given, each after what it has to have printed before."""
    host, port = proxy.address("tls")
    process = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"{host}:{port}", "-servername", "server.test", "-cert", proxy.keys / "good.pem",
         "-key", proxy.keys / "good.key", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # Its input stays open: at the end of it s_client leaves before the answer comes.
    ending = threading.Timer(wire.PATIENCE, process.kill)
    ending.start()
    printed, left = b"", list(say)
    while got := process.stdout.read1(1 << 16):
        printed += got
        while left and left[0][0] in printed:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(left.pop(0)[1])
                process.stdin.flush()
    ending.cancel()
    process.kill()
    process.wait()
    return printed


@scenario(63, "a session ticket allows no early data")
def ticket(proxy, _):
    needs(proxy, "tls")
    ask = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    printed = openssl(proxy, "-tls1_3", say=[(b"Verify return code", ask)])
    if b"HTTP/1.1 200" not in printed:
        return f"no answer: {printed[-200:]!r}"
    tickets = printed.split(b"Max Early Data: ")[1:]
    return f"a ticket allows early data: {tickets[0][:10]!r}" if any(not t.startswith(b"0\n") for t in tickets) else None


@scenario(63, "a renegotiation is refused")
def renegotiation(proxy, server):
    needs(proxy, "tls")
    ask = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    # Without one the same is served.
    if b"HTTP/1.1 200" not in openssl(proxy, "-tls1_2", say=[(b"Verify return code", ask)]):
        return "TLS 1.2 is not served"
    server.begin({})
    printed = openssl(proxy, "-tls1_2", say=[(b"Verify return code", b"R\n"), (b"RENEGOTIATING", ask)])
    if b"RENEGOTIATING" not in printed:
        return f"none was asked for: {printed[-200:]!r}"
    return "it was served after one" if server.requests() or b"HTTP/1.1 200" in printed else None


@scenario(63, "an answer of TLS 1.2 says that 1.3 was there")
def downgrade(proxy, _):
    needs(proxy, "tls")
    kind, content = reply(proxy, greeting(proxy, maximum_version=ssl.TLSVersion.TLSv1_2).bytes())
    if not is_server_hello(kind, content):
        return f"answered with {kind!r} {content[:8].hex()}"
    # RFC 8446 section 4.1.3: the end of the server's random.
    return None if content[30:38] == b"DOWNGRD\x01" else f"the random ends with {content[30:38].hex()}"
