"""Whether what came of a case is one of the outcomes that it calls safe."""
import json
import time

import wire


def judge(case, outcome):
    """None, or why no safe outcome of the case fits."""
    wrongs = [wrong(safe, outcome) for safe in case["safe"]]
    return None if None in wrongs else "; or ".join(dict.fromkeys(wrongs))


def wrong(safe, outcome):
    return next((w for key, wanted in safe.items() if (w := RULES[key](wanted, outcome))), None)


def status(wanted, outcome):
    got = [r.status for r in outcome["found"]]
    fits = len(got) == len(wanted) and all(g in w if isinstance(w, list) else g == w for g, w in zip(got, wanted))
    return None if fits else f"status {got} where {wanted}"


def status_first(wanted, outcome):
    got = [r.status for r in outcome["found"]][:1]
    return None if not got or got[0] in wanted else f"status {got} where one of {wanted}"


def closed(wanted, outcome):
    return None if outcome["closed"] == wanted else "the connection stays open" if wanted else "the connection ended"


def upstream(wanted, outcome):
    n = len(outcome["requests"])
    if wanted == 0 and not n and outcome["raw"]:
        return f"the upstream got {outcome['raw'][:60]!r}"
    return None if n == wanted else f"{n} requests upstream where {wanted}"


def requests_complete(wanted, outcome):
    n = len(outcome["requests"])
    return None if n == wanted else f"{n} whole requests upstream where {wanted}"


def requests_below(wanted, outcome):
    n = len(outcome["requests"])
    return None if n < wanted else f"{n} requests upstream, {wanted} are too many"


def bodies(wanted, outcome):
    got = [body.decode("latin-1") for _, body in outcome["requests"]]
    return None if got == wanted else f"bodies {got} upstream where {wanted}"


def targets(wanted, outcome):
    got = [head.split(b" ")[1].decode("latin-1") for head, _ in outcome["requests"]]
    return None if got == wanted else f"targets {got} upstream where {wanted}"


def lacks_target(wanted, outcome):
    got = [head.split(b" ")[1].decode("latin-1") for head, _ in outcome["requests"]]
    return next((f"the upstream was asked for {w}" for w in wanted if w in got), None)


def has(wanted, outcome):
    return next((f"no {w!r} upstream" for w in wanted if wire.latin(w) not in outcome["raw"]), None)


def lacks(wanted, outcome):
    return next((f"{w!r} went upstream" for w in wanted if wire.latin(w) in outcome["raw"]), None)


def memory(wanted, outcome):
    grown = outcome["memory"]
    return None if grown <= wanted else f"memory grew by {grown} kB where {wanted} are allowed"


def streams(wanted, outcome):
    for name, allowed in wanted.items():
        got = outcome["streams"].get(name)
        if got not in allowed:
            return f"stream {name} ended with {got} ({outcome['goaway']}) where {allowed}"
    return None


def goaway(wanted, outcome):
    """A connection that just ends will do: while the client is still sending, GOAWAY may be lost in the reset."""
    if outcome["goaway"] is None and outcome["closed"]:
        return None
    return None if outcome["goaway"] in wanted else f"GOAWAY {outcome['goaway']} {dict(list(outcome['streams'].items())[:3])} where {wanted}"


def log(_, outcome):
    """Every line of the log is one JSON object; the log is written behind the answer, so it may take a while."""
    if outcome["log"] is None:
        return None
    end = time.monotonic() + wire.PATIENCE
    while not (lines := outcome["log"]()) and time.monotonic() < end:
        time.sleep(0.05)
    if not lines:
        return "no log line"
    for line in lines:
        try:
            json.loads(line.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        except ValueError:
            return f"no JSON in the log: {line[:100]!r}"
    return None


RULES = {f.__name__: f for f in (status, status_first, closed, upstream, requests_complete, requests_below, bodies, targets,
                                 lacks_target, has, lacks, memory, streams, goaway, log)}
