"""HTTP/1 as bytes: a client that sends what a case says, and a reader of whatever comes back."""
import contextlib
import socket
import time

# How long an answer, or the end of a connection, may take on a busy machine.
PATIENCE = 10.0


def latin(text):
    """A case's text is its bytes: one character, one byte."""
    return text.encode("latin-1")


def pieces(send):
    """The steps of a case one by one: bytes, or a dictionary that says something else."""
    for step in [send] if isinstance(send, (str, dict)) else send:
        if isinstance(step, str):
            yield latin(step)
        elif "repeat" in step and "text" in step:
            yield latin(step["text"]) * step["repeat"]
        else:
            yield step


class Response:
    """One response of HTTP/1: its status, its head and its body as bytes."""

    def __init__(self, status, head, body):
        self.status, self.head, self.body = status, head, body

    def header(self, name):
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == latin(name):
                return value.strip().decode("latin-1")
        return None


class Connection:
    """A connection to a proxy; keeps what was read but not understood yet."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer, self.ended = b"", False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.socket.close()

    def send(self, data):
        """True when the peer took it all; a peer that has closed is no failure of the case."""
        try:
            self.socket.sendall(data)
            return True
        except OSError:
            return False

    def play(self, send):
        """Does the steps; stops early when the peer has closed."""
        for step in pieces(send):
            if isinstance(step, bytes):
                if not self.send(step):
                    return
            elif "pause" in step:
                time.sleep(step["pause"] / 1000)
            elif "drip" in step:
                for byte in latin(step["drip"]):
                    if not self.send(bytes([byte])):
                        return
                    time.sleep(step["every"] / 1000)
            elif "shutdown" in step:
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_WR)
            elif "reset" in step:
                # SO_LINGER of zero seconds: close sends RST.
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                self.socket.close()
                self.ended = True
                return
            else:
                raise ValueError(f"unknown step {step}")

    def more(self, timeout=PATIENCE):
        """Reads once; False at the end or when nothing comes."""
        if self.ended:
            return False
        self.socket.settimeout(max(timeout, 0.01))
        try:
            got = self.socket.recv(1 << 16)
        except TimeoutError:
            return False
        except OSError:
            got = b""
        if not got:
            self.ended = True
            return False
        self.buffer += got
        return True

    def exactly(self, n):
        while len(self.buffer) < n and self.more():
            pass
        taken, self.buffer = self.buffer[:n], self.buffer[n:]
        return taken

    def until(self, mark):
        while mark not in self.buffer and self.more():
            pass
        if mark not in self.buffer:
            return None
        taken, _, self.buffer = self.buffer.partition(mark)
        return taken

    def response(self, to_head=False):
        """The next final response, or None when there is no whole one."""
        while True:
            head = self.until(b"\r\n\r\n")
            if head is None:
                return None
            try:
                status = int(head.split(b" ", 2)[1])
            except (IndexError, ValueError):
                return None
            if status >= 200 or status == 101:
                break
        made = Response(status, head, b"")
        if to_head or status in (101, 204, 304):
            return made
        length = made.header("content-length")
        if (made.header("transfer-encoding") or "").lower() == "chunked":
            while True:
                size = self.until(b"\r\n")
                if size is None:
                    return None
                n = int(size.split(b";")[0], 16)
                if n == 0:
                    while True:
                        line = self.until(b"\r\n")
                        if not line:
                            return made if line is not None else None
                made.body += self.exactly(n)
                if self.exactly(2) != b"\r\n":
                    return None
        if length is not None:
            made.body = self.exactly(int(length))
            return made if len(made.body) == int(length) else None
        while self.more():
            pass
        made.body, self.buffer = self.buffer, b""
        return made

    def closes(self, timeout=PATIENCE):
        """True when the peer ends the connection, however it does it."""
        end = time.monotonic() + timeout
        while not self.ended and time.monotonic() < end:
            self.more(end - time.monotonic())
        return self.ended
