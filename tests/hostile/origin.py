"""The server behind the proxy: answers as the case says and keeps every byte that reached it."""
import contextlib
import re
import socket
import threading
import time

from wire import latin

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Origin:
    """Listens on a port of its own; `begin` sets what the next case wants."""

    def __init__(self, port=0):
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.lock = threading.Lock()
        self.begin({})
        threading.Thread(target=self.accept, daemon=True).start()

    def begin(self, script):
        """`answer`: the bytes of each answer; `close`: end the connection behind it; `early`: answer the head at once;
        `drip`: milliseconds between its bytes; `silent`: never answer; `first`: bytes said before any request."""
        with self.lock:
            self.script, self.connections = script, []

    def accept(self):
        while True:
            with contextlib.suppress(OSError):
                stream, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(stream,), daemon=True).start()

    def requests(self):
        """The requests of the case, markers left out: (head, body) in the order of arrival."""
        with self.lock:
            return [r for c in self.connections for r in c["requests"] if b"/marker" not in r[0].split(b"\r\n")[0]]

    def bytes(self):
        """All that arrived in the case, but for markers."""
        with self.lock:
            return b"".join(c["raw"] for c in self.connections if c["raw"])

    def serve(self, stream):
        with contextlib.suppress(OSError), stream:
            self.converse(stream)

    def converse(self, stream):
        buffer, record, script = b"", None, None
        if self.script.get("first"):
            stream.sendall(latin(self.script["first"]))
        while True:
            # A connection may live on into the next case: each case has a record of its own.
            while b"\r\n\r\n" not in buffer:
                got = stream.recv(1 << 16)
                if not got:
                    return
                record, script = self.record(record, got)
                buffer += got
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            marker = re.match(rb"\w+ (?:http://[^/ ]+)?/marker-(\d+)", head)
            early = script.get("early") and not marker
            if early:
                stream.sendall(latin(script["answer"]))
            body, buffer, record = self.body(stream, head, buffer, record)
            with self.lock:
                record["requests"].append((head, body))
            if marker:
                name = b"marker-" + marker[1]
                stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(name), name))
                continue
            if early:
                if script.get("close"):
                    return
                continue
            if script.get("silent"):
                continue
            answer = latin(script["answer"]) if "answer" in script else OK
            answer += latin(script.get("padding", "")) * script.get("paddings", 0)
            if head.startswith(b"HEAD ") and "answer" not in script:
                answer = answer[: answer.index(b"\r\n\r\n") + 4]
            if "drip" in script:
                for byte in answer:
                    stream.sendall(bytes([byte]))
                    time.sleep(script["drip"] / 1000)
            else:
                stream.sendall(answer)
            if script.get("close"):
                return

    def record(self, record, got):
        with self.lock:
            if record is None or record not in self.connections:
                record = {"raw": b"", "requests": []}
                self.connections.append(record)
            if not got.startswith(b"GET /marker"):
                record["raw"] += got
            return record, self.script

    def body(self, stream, head, buffer, record):
        """The body as its head frames it, read as leniently as a poor server would."""
        def more():
            nonlocal buffer, record
            got = stream.recv(1 << 16)
            if not got:
                raise OSError("ended")
            record, _ = self.record(record, got)
            buffer += got

        if re.search(rb"\r\ntransfer-encoding:[^\r]*chunked", head, re.I):
            body = b""
            while True:
                while b"\r\n" not in buffer:
                    more()
                size, _, buffer = buffer.partition(b"\r\n")
                n = int(size.split(b";")[0] or b"0", 16)
                while len(buffer) < n + 2:
                    more()
                body, buffer = body + buffer[:n], buffer[n + 2 :]
                if n == 0:
                    return body, buffer, record
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
        n = int(length[1]) if length else 0
        while len(buffer) < n:
            more()
        return buffer[:n], buffer[n:], record
