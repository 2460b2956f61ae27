"""What the cases share."""
import os
import pathlib
import subprocess
import time

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
OUTRIGGER = os.environ.get("OUTRIGGER_BIN", str(TOP / "target/release/outrigger"))
PROXY = os.environ.get("OUTRIGGER_PROXY_BIN", str(pathlib.Path(OUTRIGGER).parent / "outrigger-proxy"))
PASSED, FAILED = [], []


def check(name, ok, detail=""):
    (PASSED if ok else FAILED).append(name)
    print(f"{'ok' if ok else 'FAILED'}: {name}{'' if ok else ': ' + str(detail)}", flush=True)
    return bool(ok)


def run(*command, env=None, **more):
    return subprocess.run(command, capture_output=True, text=True, env=env, **more)


def eventually(what, seconds=20):
    """What `what` gives as soon as it is something, else its last answer."""
    end = time.monotonic() + seconds
    value = what()
    while not value and time.monotonic() < end:
        time.sleep(0.1)
        value = what()
    return value
