#!/usr/bin/env python3
"""Checks deploy/grafana/penstock.json: every expression returns data from a scrape of a running Penstock.

    scripts/with_up.py -- scripts/check_dashboard.py [DASHBOARD]

Reads PENSTOCK_UP (what `penstock up --json` printed), sends traffic of every kind the panels show, starts Debian's
prometheus on a free port with the jobs of deploy/prometheus/prometheus.yml pointed at this Penstock, waits for a few
scrapes of each target, and evaluates every expression of every panel and variable. An expression without a sample, or
with NaN only, is named and fails the check. Also runs `promtool check metrics` over what each process serves.
Needs Python's standard library, prometheus and promtool.
"""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "penstock.json"
# Rates need two samples of a window; counters that start with the traffic need one before it and some after.
SCRAPES = 4
DEADLINE_S = 90


class Failure(Exception):
    """A sentence for whoever ran the script."""


def fetch(url: str, body: dict | None = None, timeout: float = 20) -> tuple[int, bytes]:
    """Status and whole body; an HTTP error is an answer, not an exception."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def chat(base: str, model: str, stream: bool) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 16, "stream": stream}
    return fetch(f"{base}/v1/chat/completions", body)[0]


def leave_early(base: str, model: str) -> None:
    """A client that goes away after the first bytes of a stream."""
    host, port = base.removeprefix("http://").rsplit(":", 1)
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        connection.recv(1)


class Traffic(threading.Thread):
    """Unary and streamed chats, an unknown model and a client that leaves, over and over until told to stop."""

    def __init__(self, base: str, model: str) -> None:
        super().__init__(daemon=True)
        self.base, self.model = base, model
        self.over = threading.Event()
        self.problem: str | None = None

    def run(self) -> None:
        try:
            while not self.over.is_set():
                for model, stream, wanted in [
                    (self.model, True, 200),
                    (self.model, False, 200),
                    ("no-such-model", False, 404),
                ]:
                    status = chat(self.base, model, stream)
                    if status != wanted:
                        raise Failure(f"a chat with model {model!r} answered {status}, not {wanted}")
                leave_early(self.base, self.model)
                self.over.wait(0.1)
        except (Failure, OSError) as error:
            self.problem = str(error)


def jobs(up: dict) -> dict[str, list[str]]:
    """The targets of this Penstock for each job of the committed configuration."""
    here = {
        "penstock-proxy": [up["proxy_private"]],
        "penstock-controlplane": [up["controlplane"]],
        "penstock-agent": [up["agent_private"]],
        "vllm": [engine["address"] for engine in up["engines"]],
    }
    committed = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    named = re.findall(r"job_name: *(\S+)", committed)
    if sorted(named) != sorted(here):
        raise Failure(f"prometheus.yml has the jobs {named}, this check knows {sorted(here)}")
    return here


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def prometheus(targets: dict[str, list[str]], folder: Path):
    """A Prometheus that scrapes `targets` every second; yields its address; gone afterwards."""
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": job, "static_configs": [{"targets": t}]} for job, t in targets.items()],
    }
    # JSON is YAML.
    (folder / "prometheus.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                if fetch(f"http://{address}/-/ready")[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failure("prometheus did not start:\n" + (folder / "prometheus.log").read_text()[-2000:])
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def query(address: str, expr: str) -> list[dict]:
    status, body = fetch(f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expr})}")
    answer = json.loads(body)
    if status != 200 or answer["status"] != "success":
        raise Failure(answer.get("error", f"answered {status}"))
    return answer["data"]["result"]


def wait_for_scrapes(address: str, targets: dict[str, list[str]], traffic: Traffic) -> None:
    deadline = time.monotonic() + DEADLINE_S
    wanted = sum(len(t) for t in targets.values())
    while True:
        scraped = query(address, f"count_over_time(up[5m]) >= {SCRAPES} and up == 1")
        if len(scraped) == wanted:
            return
        if traffic.problem:
            raise Failure(traffic.problem)
        if time.monotonic() > deadline:
            down = sorted(s["metric"]["instance"] for s in query(address, "up == 0"))
            raise Failure(f"{len(scraped)} of {wanted} targets were scraped {SCRAPES} times; down: {down}")
        time.sleep(0.2)


def substituted(expr: str, variables: list[str]) -> str:
    """The expression as Grafana sends it with every variable at "All"."""
    for name, value in [("__rate_interval", "30s"), ("__interval", "5s"), ("__range", "1m")]:
        expr = expr.replace(f"${name}", value).replace(f"${{{name}}}", value)
    for name in variables:
        expr = re.sub(rf"\$(\{{{name}(:\w+)?\}}|{name}\b)", ".*", expr)
    return expr


def panels_of(dashboard: dict) -> list[dict]:
    """All panels, those inside rows too."""
    found = []
    for panel in dashboard["panels"]:
        found += [panel, *panel.get("panels", [])]
    return found


def expressions(dashboard: dict) -> list[tuple[str, str]]:
    """(where, expression) of every variable and panel."""
    variables = [v["name"] for v in dashboard["templating"]["list"]]
    found = []
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series = re.fullmatch(r"label_values\((.+), *(\w+)\)", variable["query"]["query"])
            if not series:
                raise Failure(f"variable {variable['name']}: its query is not label_values(SERIES, LABEL)")
            found.append((f"variable {variable['name']}", f'count by ({series[2]}) ({series[1]}) > 0'))
    for panel in panels_of(dashboard):
        targets = panel.get("targets", [])
        if not targets and panel["type"] not in ("row", "text"):
            raise Failure(f"panel {panel['title']!r} shows nothing")
        found += [(f"panel {panel['title']!r} {t['refId']}", substituted(t["expr"], variables)) for t in targets]
    return found


def has_data(samples: list[dict]) -> bool:
    return any(not math.isnan(float(sample["value"][1])) for sample in samples)


def failing_expressions(address: str, wanted: list[tuple[str, str]]) -> list[str]:
    failing = []
    for where, expr in wanted:
        try:
            if not has_data(query(address, expr)):
                failing.append(f"{where}: no data: {expr}")
        except Failure as error:
            failing.append(f"{where}: {error}: {expr}")
    return failing


def lint_metrics(up: dict) -> list[str]:
    problems = []
    for process in ["proxy_private", "controlplane", "agent_private"]:
        status, text = fetch(f"http://{up[process]}/metrics")
        if status != 200:
            problems.append(f"{process}: /metrics answers {status}")
            continue
        lint = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
        said = (lint.stdout + lint.stderr).decode().strip()
        if lint.returncode != 0:
            problems += [f"{process}: {line}" for line in said.splitlines()]
    return problems


def check(dashboard: dict, up: dict) -> list[str]:
    wanted = expressions(dashboard)
    targets = jobs(up)
    base, model = f"http://{up['public']}", up["models"][0]
    with tempfile.TemporaryDirectory(prefix="penstock-prometheus-") as folder:
        with prometheus(targets, Path(folder)) as address:
            traffic = Traffic(base, model)
            traffic.start()
            try:
                wait_for_scrapes(address, targets, traffic)
                deadline = time.monotonic() + 20
                # What is counted only at a request's end can be a scrape or two behind.
                while (failing := failing_expressions(address, wanted)) and time.monotonic() < deadline:
                    time.sleep(1)
            finally:
                traffic.over.set()
                traffic.join(30)
            if traffic.problem:
                failing.append(traffic.problem)
    if not failing:
        print(f"{len(wanted)} expressions return data")
    return failing


def main() -> int:
    if "PENSTOCK_UP" not in os.environ:
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    up = json.loads(os.environ["PENSTOCK_UP"])
    dashboard = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else DASHBOARD).read_text())
    try:
        problems = check(dashboard, up) + lint_metrics(up)
    except Failure as failure:
        problems = [str(failure)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
