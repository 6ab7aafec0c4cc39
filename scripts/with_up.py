#!/usr/bin/env python3
"""Runs a command against a Penstock of its own: starts `penstock up`, waits until it is ready, runs the command, stops it.

    scripts/with_up.py [--up FLAG]... -- COMMAND...

The command finds the gateway in its environment: BASE_URL (http://host:port), MODEL (the first model; empty if the gateway
asks for a key before it lists them) and PENSTOCK_UP (the whole JSON line that `penstock up --json` printed). The binary is $PENSTOCK_BIN, else target/debug/penstock.
Exit code: the command's, or 1 when `penstock up` did not start, did not stop cleanly, or left a process behind; what it
logged is printed then. Needs Python's standard library alone.
"""

import argparse
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

READY_DEADLINE_S = int(os.environ.get("READY_DEADLINE_S", "90"))
STOP_DEADLINE_S = 60
LEFTOVERS_DEADLINE_S = 5


class Failure(Exception):
    """A sentence for whoever ran the script."""


def binary() -> str:
    root = Path(__file__).resolve().parent.parent
    target = Path(os.environ.get("CARGO_TARGET_DIR") or root / "target")
    path = os.environ.get("PENSTOCK_BIN") or str(target / "debug" / "penstock")
    if not os.access(path, os.X_OK):
        raise Failure(f"{path} is not there: run `cargo build -p penstock`, or set PENSTOCK_BIN")
    return path


def first_json_line(up: subprocess.Popen) -> dict:
    """What `penstock up --json` says once all is ready; lines before it that are not JSON are passed on."""
    deadline = time.monotonic() + READY_DEADLINE_S
    selector = selectors.DefaultSelector()
    selector.register(up.stdout, selectors.EVENT_READ)
    buffered = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not selector.select(left):
            raise Failure(f"`penstock up` was not ready after {READY_DEADLINE_S} s")
        chunk = os.read(up.stdout.fileno(), 65536)
        if not chunk:
            raise Failure(f"`penstock up` ended with exit code {up.wait()} before it was ready")
        buffered += chunk
        while b"\n" in buffered:
            line, buffered = buffered.split(b"\n", 1)
            if line.startswith(b"{"):
                return json.loads(line)
            print(line.decode(errors="replace"), file=sys.stderr)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def end_leftovers(started: list[int], wait_s: float) -> list[int]:
    """Waits for these processes to end; kills those that do not and returns them."""
    deadline = time.monotonic() + wait_s
    while (left := [pid for pid in started if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def stop(up: subprocess.Popen, started: list[int]) -> None:
    """SIGTERM, exit code 0, and nothing left of what it started."""
    try:
        if up.poll() is not None:
            raise Failure(f"`penstock up` ended by itself, with exit code {up.returncode}")
        up.terminate()
        try:
            code = up.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            up.kill()
            up.wait()
            raise Failure(f"`penstock up` had not ended {STOP_DEADLINE_S} s after SIGTERM") from None
        if code != 0:
            raise Failure(f"`penstock up` ended with exit code {code} after SIGTERM, not 0")
    finally:
        left = end_leftovers(started, LEFTOVERS_DEADLINE_S)
    if left:
        raise Failure(f"`penstock up` ended and left processes behind: {left}")


def run(command: list[str], flags: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="penstock-test-") as folder:
        log = Path(folder, "up.log")
        arguments = [binary(), "up", "--json", "--ports", "auto", "--data-dir", str(Path(folder, "data")), *flags]
        with log.open("wb") as stderr:
            up = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
        started: list[int] = []
        try:
            try:
                ready = first_json_line(up)
                started = [*ready["pids"].values(), *(engine["pid"] for engine in ready["engines"])]
                environment = {
                    **os.environ,
                    "BASE_URL": f"http://{ready['public']}",
                    "MODEL": (ready["models"] or [""])[0],
                    "PENSTOCK_UP": json.dumps(ready),
                }
                code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
            except BaseException as first:
                try:
                    stop(up, started)
                except Failure as second:
                    if up.returncode is None or not isinstance(first, Failure):
                        print(f"with_up: {second}", file=sys.stderr)
                raise
            stop(up, started)
        except Failure:
            print(f"--- {' '.join(arguments)} logged:", file=sys.stderr)
            print("\n".join(log.read_text(errors="replace").splitlines()[-60:]), file=sys.stderr)
            raise
        return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--up", action="append", default=[], metavar="FLAG", help="a further flag of `penstock up`")
    parser.add_argument("command", nargs="+", help="the command and its arguments, after --")
    options = parser.parse_args()
    # A SIGTERM ends this script through the same `finally` as Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(options.command, options.up)
    except Failure as failure:
        print(f"with_up: {failure}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
