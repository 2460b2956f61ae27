"""Cases of many streams, and of a proxy that refuses load: what each costs, and what reaches the server behind it."""
import contextlib
import pathlib
import tempfile
import threading
import time

import h2
import wire
from life import again, asked, serves
from scenarios import Skip, needs, scenario

TYPES = "type.googleapis.com/envoy.extensions."
RESET = {"frame": "RST_STREAM", "hex": "00000008"}
# Requests whose client is gone: a whole one, many, half of one, bodies that do not come or are wrong, a line that is none.
REQUESTS = ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 20, "GET / HTTP/1.1\r\nHo",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx", "GET / HTTP/1.1\r\n: \r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n"]
# Requests over HTTP/2 that are reset in the packet that they come in.
RESETS = [[{"request": "/"}, RESET], [{"request": "/", "end": False}, RESET, {"frame": "DATA", "payload": "x"}]]
# The streams that a client may have open (`manager` in proxies.py).
ADVERTISED = 100


# --- overload ------------------------------------------------------------------------------------------------------

def refusing(proxy, place, name):
    """The directory of a file, what writes that file, and an instance that refuses load at a place while it says 1."""
    if proxy.name not in ("outrigger", "envoy"):
        raise Skip
    home = tempfile.TemporaryDirectory(prefix="hostile-pressure-")
    file = pathlib.Path(home.name) / "pressure"

    def say(text):
        # The file is watched for being replaced.
        new = file.with_suffix(".new")
        new.write_text(text)
        new.rename(file)

    say("1")
    manager = {"refresh_interval": "0.05s", "resource_monitors": [
        {"name": "pressure", "typed_config": {
            "@type": TYPES + "resource_monitors.injected_resource.v3.InjectedResourceConfig", "filename": str(file)}}],
        place: [{"name": name, "triggers": [{"name": "pressure", "threshold": {"value": 0.9}}]}]}
    return home, say, again(proxy, edit=lambda config: {**config, "overload_manager": manager})


def reset_under_overload(place, name):
    @scenario(31, f"requests that were reset already, under {name.rpartition('.')[2]}")
    def scene(proxy, server):
        home, say, started = refusing(proxy, place, name)
        with home, started as other:
            end = time.monotonic() + wire.PATIENCE
            while asked(other) == 200:
                if time.monotonic() > end:
                    return "it does not refuse load"
                time.sleep(0.05)
            server.begin({})
            for request in REQUESTS:
                for pause in (0, 2):
                    for _ in range(25):
                        with wire.Connection(other.address()) as client:
                            client.play([request, {"pause": pause}, {"reset": True}])
            # The dispatch of HTTP/1 alone is refused there, so HTTP/2 may pass.
            for steps in [] if "http1" in name else RESETS:
                for _ in range(25):
                    with h2.Client(other.address()) as client:
                        client.do([{"repeat": 20, "steps": steps}])
                        client.play([{"reset": True}])
            if not other.alive():
                return "the proxy is gone"
            if server.requests():
                return f"{len(server.requests())} requests went upstream"
            status = asked(other)
            # Envoy says 500 where the dispatch is refused.
            if status not in (500, 503):
                return f"the next client got {status or 'nothing'}, where load is still refused"
            say("0")
            return serves(other)


reset_under_overload("actions", "envoy.overload_actions.stop_accepting_requests")
reset_under_overload("loadshed_points", "envoy.load_shed_points.http1_server_abort_dispatch")
reset_under_overload("loadshed_points", "envoy.load_shed_points.http_connection_manager_decode_headers")


# --- streams and what they cost ------------------------------------------------------------------------------------

class Open:
    """The streams that are open at the server over HTTP/2, which answers none."""

    def __init__(self, origin):
        self.lock, self.streams, self.now, self.most, self.all = threading.Lock(), {}, 0, 0, 0
        origin.begin(self.came, went=self.went)

    def came(self, stream, connection, number):
        with self.lock:
            self.streams.setdefault(connection, set()).add(number)
            self.now, self.all = self.now + 1, self.all + 1
            self.most = max(self.most, self.now)

    def went(self, connection, number=None):
        """A stream was reset, or with no number all of a connection's."""
        with self.lock:
            there = self.streams.get(connection, set())
            gone = there & {number} if number is not None else set(there)
            there -= gone
            self.now -= len(gone)

    def until(self, number):
        """Whether soon no more and no fewer are open."""
        return soon(lambda: self.now == number)


def soon(holds):
    end = time.monotonic() + wire.PATIENCE
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


def wide(config):
    """As many streams as are asked for, towards the proxy and behind it, and as long as opening them takes."""
    for listener in config["static_resources"]["listeners"]:
        for chain in listener["filter_chains"]:
            fields = chain["filters"][0]["typed_config"]
            if "http2_protocol_options" in fields:
                fields["http2_protocol_options"]["max_concurrent_streams"] = 100000
                fields["stream_idle_timeout"] = "60s"
    for cluster in config["static_resources"]["clusters"]:
        cluster["circuit_breakers"] = {"thresholds": [{"max_requests": 100000, "max_pending_requests": 100000}]}
    return config


def cost(proxy, origin, streams, at_once):
    """Seconds of processor time for each of STREAMS that are opened AT_ONCE on one connection and then reset together."""
    spent, opened = 0.0, Open(origin)
    for _ in range(streams // at_once):
        with h2.Client(proxy.address("h2up")) as client:
            client.read(lambda: client.frames > 0)
            before = proxy.cpu()
            client.do([{"repeat": at_once, "steps": [{"request": "/", "end": False}]}])
            if not opened.until(at_once):
                return f"{opened.now} of {at_once} streams came to the server"
            client.send(b"".join(h2.frame(h2.RST_STREAM, 0, 2 * n + 1, b"\0\0\0\x08") for n in range(at_once)))
            if not opened.until(0):
                return f"{opened.now} of {at_once} streams stay open at the server"
            spent += proxy.cpu() - before
    return spent / streams


@scenario(54, "opening and resetting a stream costs the same among many")
def streams_cost(proxy, _):
    needs(proxy, "h2up")
    # An instance each: the server's connections end between the two.
    with again(proxy, edit=wide) as other:
        few = cost(other, proxy.http2_origin, 20000, 100)
    with again(proxy, edit=wide) as other:
        many = few if isinstance(few, str) else cost(other, proxy.http2_origin, 20000, 10000)
        if isinstance(many, str):
            return many
        # A cost that grows with the number of streams would be a hundred times as high.
        if many > 4 * max(few, 1e-5):
            return f"{few * 1e6:.0f} µs for each of 100 streams, {many * 1e6:.0f} µs for each of 10,000"
        return serves(other)


# What a stream is opened with and what then makes the proxy reset it.
PROVOKED = {
    "a window update of zero": (False, {"frame": "WINDOW_UPDATE", "hex": "00000000"}),
    "a window that overflows": (False, {"frame": "WINDOW_UPDATE", "hex": "7fffffff"}),
    "a priority of a wrong size": (False, {"frame": "PRIORITY", "hex": "00000000"}),
    "headers behind the end": (True, {"request": "/"}),
    "data behind the end": (True, {"frame": "DATA", "payload": "x"}),
    "the client itself": (False, RESET),
}


def provoked(name, end, step):
    @scenario(45, f"streams that the server has when {name} resets them")
    def scene(proxy, _):
        needs(proxy, "h2up")
        with again(proxy) as other:
            opened, sent = Open(proxy.http2_origin), 1
            with h2.Client(other.address("h2up")) as client:
                client.read(lambda: client.frames > 0)
                # Once the proxy knows how many streams the server allows all go over one connection. Over two the server
                # might hear of new ones on this before it hears of the end of old ones on that.
                client.do([{"request": "/", "end": False, "stream": 1}])
                if not opened.until(1) or not soon(lambda: proxy.http2_origin.known > 0):
                    return "the proxy does not acknowledge the server's settings"
                client.do([{**RESET, "stream": 1}])
                if not opened.until(0):
                    return "the first stream stays open at the server"
                while sent < 10000 and client.goaway is None and not client.ended:
                    fresh = range(2 * sent + 1, 2 * (sent + ADVERTISED) + 1, 2)
                    sent += ADVERTISED
                    client.do([{"request": "/", "end": end, "stream": n} for n in fresh])
                    # The resets follow when the server has all that it will get.
                    client.read(lambda: opened.all >= sent, 0.2)
                    client.do([{**step, "stream": n} for n in fresh])
                    client.drain()
                client.read(lambda: client.goaway not in (None, "NO_ERROR"), 2)
            if not opened.until(0):
                return f"{opened.now} streams stay open at the server"
            if opened.all < ADVERTISED:
                return f"only {opened.all} streams came to the server"
            if proxy.http2_origin.connections != 1:
                return f"{proxy.http2_origin.connections} connections to the server"
            if opened.most > ADVERTISED:
                return f"the server had {opened.most} at once, of {opened.all}, where the client may have {ADVERTISED}"
        return None


for name, (end, step) in PROVOKED.items():
    provoked(name, end, step)


@scenario(47, "heads that are made large of few bytes, on streams whose window stays shut")
def pinned(proxy, server):
    if not proxy.process:
        raise Skip
    server.begin({"answer": "HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n", "padding": "x" * 1048576, "paddings": 1})
    before = proxy.memory()
    # No window for any stream; a field of 4,000 bytes in the table, which every head names twelve times.
    with h2.Client(proxy.address(), bytes.fromhex("000400000000")) as client:
        client.read(lambda: client.frames > 0)
        fields = h2.block(h2.request_fields())
        put = b"\x40" + h2.text(b"x") + h2.text(b"y" * 4000)
        for n in range(ADVERTISED):
            head = fields + (put + b"\xbe" * 11 if n == 0 else b"\xbe" * 12)
            client.send(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 2 * n + 1, head))
        grown, end = 0, time.monotonic() + 2 * wire.PATIENCE
        while len(client.streams) < ADVERTISED and not client.ended and time.monotonic() < end:
            client.read(lambda: False, 0.05)
            grown = max(grown, proxy.memory() - before)
        open_still = 0 if client.ended else ADVERTISED - len(client.streams)
    if open_still:
        return f"{open_still} streams that can send nothing stay open; memory grew by {grown} kB"
    # What the limits of a stream add up to: its head, there and on its way upstream, a buffer of 32 KiB each way, and the
    # 64 KiB that may wait to be written.
    limit = ADVERTISED * (2 * 60 + 2 * 32 + 64)
    return None if grown <= limit else f"memory grew by {grown} kB where {limit} are allowed"

@scenario(49, "DATA of one byte each for a server that takes none")
def one_byte_each(proxy, _):
    needs(proxy, "h2up")
    # As much as the windows of the connection and of each stream allow.
    opened, size, streams = Open(proxy.http2_origin), 60000, 16
    before, grown = proxy.memory(), 0
    with h2.Client(proxy.address("h2up")) as client:
        client.read(lambda: client.frames > 0)
        for n in range(streams):
            client.do([{"request": "/", "method": "POST", "end": False}])
            client.do([{"repeat": size, "steps": [{"frame": "DATA", "payload": "x"}]}])
            grown = max(grown, proxy.memory() - before)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            client.drain()
            grown = max(grown, proxy.memory() - before)
            time.sleep(0.02)
    if not opened.until(0):
        return f"{opened.now} streams stay open at the server"
    # Ten times the data, which are a tenth of the bytes that the client has to send.
    limit = 10 * size * streams // 1024
    return None if grown <= limit else f"memory grew by {grown} kB for {size * streams // 1024} kB of data"
