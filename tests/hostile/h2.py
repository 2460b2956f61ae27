"""HTTP/2 as frames: enough of RFC 9113 and RFC 7541 to say wrong things on purpose and to read the answer."""
import contextlib
import struct
import time

import wire

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
NAMES = ["DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE",
         "CONTINUATION"]
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
ERRORS = ["NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
          "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
          "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED"]
# The entries of the static table that a status can be (RFC 7541 appendix A).
STATUSES = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}
# Huffman codes of the digits (RFC 7541 appendix B): code, bits.
DIGITS = {(0x0, 5): 0, (0x1, 5): 1, (0x2, 5): 2, **{(0x19 + n - 3, 6): n for n in range(3, 10)}}


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def number(value, bits, first=0):
    """An integer with a prefix (RFC 7541 section 5.1)."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([first | value])
    out, value = [first | limit], value - limit
    while value >= 128:
        out.append(value % 128 | 128)
        value //= 128
    return bytes([*out, value])


def text(value):
    return number(len(value), 7) + value


def block(fields):
    """A header block: every field a literal, nothing indexed, nothing compressed."""
    return b"".join(b"\0" + text(wire.latin(n)) + text(wire.latin(v)) for n, v in fields)


def request_fields(target="/", method="GET", host="a", more=()):
    return [(":method", method), (":scheme", "http"), (":path", target), (":authority", host), *more]


def huffman_digits(data):
    bits = "".join(f"{b:08b}" for b in data)
    found = ""
    while len(found) < 3:
        for size in (5, 6):
            if (int(bits[:size], 2), size) in DIGITS:
                found += str(DIGITS[int(bits[:size], 2), size])
                bits = bits[size:]
                break
        else:
            raise ValueError("no digits")
    return int(found)


class Statuses:
    """Finds `:status`, the first field of a response, in the header blocks of one connection."""

    def __init__(self):
        self.dynamic = None

    def of(self, data):
        while data and data[0] & 0xE0 == 0x20:  # a change of the table's size
            data = data[1:] if data[0] & 0x1F < 31 else data[3:]
        first = data[0]
        if first & 0x80:
            return STATUSES.get(first & 0x7F, self.dynamic)
        name = first & (0x3F if first & 0x40 else 0x0F)
        rest = data[1:]
        if name == 0:
            rest = rest[1 + (rest[0] & 0x7F):]
        size = rest[0] & 0x7F
        value = rest[1 : 1 + size]
        status = huffman_digits(value) if rest[0] & 0x80 else int(value)
        if first & 0x40:
            self.dynamic = status
        return status


class Client(wire.Connection):
    """An HTTP/2 client that does what a case says and notes how each stream ends."""

    def __init__(self, address, settings=b""):
        super().__init__(address)
        self.streams, self.goaway, self.last, self.next_stream = {}, None, None, 1
        self.frames, self.data, self.table, self.acknowledge = 0, {}, Statuses(), True
        self.send(PREFACE + frame(SETTINGS, 0, 0, settings))

    def bytes_of(self, step):
        """What a step sends; `stream` is a number, "+" for a new stream, "=" for the newest one."""
        stream = step.get("stream", "=" if "frame" in step else "+")
        if stream == "+":
            stream, self.next_stream = self.next_stream, self.next_stream + 2
        elif stream == "=":
            stream = self.next_stream - 2
        else:
            self.next_stream = max(self.next_stream, stream + 2)
        if "request" in step:
            fields = [tuple(f) for f in step["fields"]] if "fields" in step else request_fields(
                step["request"], step.get("method", "GET"), step.get("host", "a"), [tuple(f) for f in step.get("more", [])])
            flags = END_HEADERS | (END_STREAM if step.get("end", True) else 0)
            if "times" in step:
                fields += [tuple(step["times"]["field"])] * step["times"]["n"]
            return frame(HEADERS, step.get("flags", flags), stream, block(fields))
        kind = NAMES.index(step["frame"]) if step["frame"] in NAMES else int(step["frame"], 0)
        payload = bytes.fromhex(step["hex"]) if "hex" in step else wire.latin(step.get("payload", ""))
        if "bomb" in step:
            # A field of 4,000 bytes goes into the dynamic table, and then a byte each names it again.
            return frame(kind, END_HEADERS, stream, b"\x40" + text(b"x") + text(b"y" * 4000) + b"\xbe" * step["bomb"])
        return frame(kind, step.get("flags", 0), stream, payload)

    def do(self, steps):
        """Sends the steps; large repeats go out in one piece of at most a thousand rounds."""
        for step in steps:
            if "repeat" in step and "steps" in step:
                left = step["repeat"]
                while left > 0:
                    now = min(left, 1000)
                    data = b"".join(self.bytes_of(s) for _ in range(now) for s in step["steps"])
                    self.drain()
                    if not self.send(data):
                        return
                    left -= now
            elif "pause" in step:
                time.sleep(step["pause"] / 1000)
            elif "settings" in step:
                self.read(lambda: self.frames > 0)
            elif "answered" in step:
                self.read(lambda: str(step["answered"]) in self.streams)
            elif "deaf" in step:
                self.acknowledge = False
            elif not self.send(self.bytes_of(step)):
                return

    def drain(self):
        """Takes what is there without waiting: a peer that cannot write may not read."""
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            while True:
                got = self.socket.recv(1 << 16)
                if not got:
                    break
                self.buffer += got
        self.socket.settimeout(wire.PATIENCE)
        while self.take():
            pass

    def take(self):
        """Handles one whole frame of the buffer."""
        if len(self.buffer) < 9:
            return False
        size = int.from_bytes(self.buffer[:3], "big")
        if len(self.buffer) < 9 + size:
            return False
        kind, flags = self.buffer[3], self.buffer[4]
        stream = int.from_bytes(self.buffer[5:9], "big") & 0x7FFFFFFF
        payload, self.buffer = self.buffer[9 : 9 + size], self.buffer[9 + size :]
        self.frames += 1
        name = str(stream)
        if kind == SETTINGS and not flags & ACK and self.acknowledge:
            self.send(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK and self.acknowledge:
            self.send(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self.last = int.from_bytes(payload[:4], "big")
            code = int.from_bytes(payload[4:8], "big")
            # A graceful end is said twice; the last word counts.
            self.goaway = ERRORS[code] if code < len(ERRORS) else str(code)
        elif kind == RST_STREAM:
            self.streams.setdefault(name, "RST " + ERRORS[int.from_bytes(payload[:4], "big")])
        elif kind == HEADERS:
            status = self.table.of(payload)
            if flags & END_STREAM:
                self.streams.setdefault(name, str(status) if name not in self.data else self.data[name][0])
            elif status is not None and status >= 200:
                self.data.setdefault(name, [str(status), 0])
        elif kind == DATA:
            entry = self.data.setdefault(name, ["?", 0])
            entry[1] += len(payload)
            if flags & END_STREAM:
                self.streams.setdefault(name, entry[0])
        return True

    def read(self, enough, timeout=wire.PATIENCE):
        """Reads until `enough()`, the end, or the time is over."""
        end = time.monotonic() + timeout
        while not enough() and not self.ended and time.monotonic() < end:
            if not self.take():
                self.more(end - time.monotonic())
        return enough()

    def settle(self, wanted):
        """Until the wanted streams have ended, or GOAWAY with an error, or the end of the connection."""
        self.read(lambda: self.goaway not in (None, "NO_ERROR") or bool(wanted) and all(s in self.streams for s in wanted))
