"""Cases of a proxy that runs out of something, is stopped, or is ended: each on an instance of its own."""
import contextlib
import resource
import signal
import threading
import time

import wire
from scenarios import Skip, scenario

GET = b"GET /marker-79 HTTP/1.1\r\nHost: a\r\n\r\n"
BODY = b"marker-79"


def again(proxy, **more):
    """Another instance of the same proxy."""
    if not getattr(proxy, "again", None):
        raise Skip
    return proxy.again(**more)


def ask(client):
    """The status of one more request on a connection, 0 where there is none."""
    if not client.send(GET):
        return 0
    got = client.response()
    return got.status if got and (got.status != 200 or got.body == BODY) else 0


def asked(proxy):
    with contextlib.suppress(OSError), wire.Connection(proxy.address()) as client:
        return ask(client)
    return 0


def serves(proxy, within=5):
    """What is wrong when new clients are not served soon; None when they are."""
    end = time.monotonic() + within
    while True:
        status = asked(proxy)
        if status == 200:
            return None
        if not proxy.alive() or time.monotonic() > end:
            return f"the next client got {status or 'nothing'}{'' if proxy.alive() else ', the proxy is gone'}"
        time.sleep(0.05)


def crowd(proxy, number):
    """Connections as far as they come about; those that are refused count as shed."""
    clients = []
    for _ in range(number):
        with contextlib.suppress(OSError):
            clients.append(wire.Connection(proxy.address()))
    return clients


def out_of_files(proxy, kept, **more):
    # Few files, so that fewer connections than were asked for can be open.
    with again(proxy, limits={resource.RLIMIT_NOFILE: 400}, **more) as small:
        with wire.Connection(small.address()) as first:
            if ask(first) != 200:
                return "the first client was not served"
            others = crowd(small, 600)
            for client in others:
                client.send(GET)
            status = ask(first)
            if status != 200 and (kept or status != 503):
                return f"a client that was there already got {status or 'nothing'}"
            before = small.cpu()
            time.sleep(1)
            if small.cpu() - before > 0.7:
                return "it spins"
            for client in others:
                client.socket.close()
            return serves(small)


@scenario(79, "more connections than files")
def files(proxy, _):
    return out_of_files(proxy, True)


@scenario(79, "more connections than files, and no limit that comes before")
def files_without_limit(proxy, _):
    if proxy.name not in ("outrigger", "envoy"):
        raise Skip
    limit = {"name": "envoy.resource_monitors.global_downstream_max_connections", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        "max_active_downstream_connections": 100000}}
    # New clients may then take the files that requests of the older ones need.
    return out_of_files(proxy, False, edit=lambda config: {**config, "overload_manager": {"resource_monitors": [limit]}})


@scenario(79, "the disk of the access log is full")
def full_disk(proxy, _):
    if proxy.name not in ("outrigger", "envoy"):
        raise Skip
    with again(proxy, log="/dev/full") as full:
        for _ in range(100):
            if asked(full) != 200:
                return "a client was not served"
        return None


@scenario(81, "stopped for some seconds")
def stopped(proxy, _):
    with again(proxy) as other:
        with wire.Connection(other.address()) as client:
            if ask(client) != 200:
                return "the first client was not served"
            other.process.send_signal(signal.SIGSTOP)
            client.send(GET)
            time.sleep(3)
            other.process.send_signal(signal.SIGCONT)
            # Limits of time may have passed meanwhile; an answer is then theirs, never somebody else's.
            got = client.response()
            if got is not None and got.status not in (200, 408, 503, 504):
                return f"it answered {got.status}"
        return serves(other)


@scenario(81, "a twentieth of the processor")
def throttled(proxy, _):
    with again(proxy) as other:
        stop = threading.Event()

        def throttle():
            while not stop.is_set():
                other.process.send_signal(signal.SIGSTOP)
                time.sleep(0.095)
                other.process.send_signal(signal.SIGCONT)
                time.sleep(0.005)

        thread = threading.Thread(target=throttle)
        thread.start()
        try:
            answers = [asked(other) for _ in range(10)]
        finally:
            stop.set()
            thread.join()
        if not set(answers) <= {0, 200, 408, 503, 504}:
            return f"it answered {answers}"
        return serves(other)


@scenario(81, "ended while 1,000 connections are open")
def ended(proxy, _):
    with again(proxy) as other:
        clients = crowd(other, 1000)
        if ask(clients[0]) != 200:
            return "the first client was not served"
        other.process.terminate()
        try:
            status = other.process.wait(20)
        except Exception:
            return "it did not end within 20 s"
        for client in clients:
            client.socket.close()
        return None if status in (0, -signal.SIGTERM, 143) else f"it ended with {status}"


@scenario(81, "killed, and started again on the same ports")
def killed(proxy, _):
    with again(proxy) as other:
        with wire.Connection(other.address()) as client:
            if ask(client) != 200:
                return "the first client was not served"
            other.process.kill()
            other.process.wait()
            if not client.closes():
                return "its client does not see that it is gone"
    with again(proxy, ports=other.ports) as other:
        return serves(other)
