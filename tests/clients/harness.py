"""What the client scripts here share: where the gateway is, what an engine itself would say, faults, and the run.

A script is `CHECKS`, a dict of functions that take its client and a `Gateway` and return a few words for the log, and one
call of `main`. It talks to any gateway; what needs simulated engines (the exact text, faults) is left out, in words, when
PENSTOCK_UP does not name them.
"""

import contextlib
import json
import os
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

TIMEOUT_S = 60
# Generous: the machine may be busy with other tests.
SETTLE_S = 20


class NeedsSimulator(Exception):
    """The check compares with simulated engines, and there are none to ask."""


def ask(address: str, method: str, path: str, body: object = None) -> dict:
    """One request straight to an engine."""
    request = urllib.request.Request(
        f"http://{address}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def is_simulated(address: str) -> bool:
    """Whether it can be asked for the truth; real engines sample."""
    try:
        return "in_flight" in ask(address, "GET", "/sim/state")
    except urllib.error.HTTPError:
        return False


@dataclass
class Gateway:
    url: str
    model: str
    key: str
    engines: list[str] = field(default_factory=list)

    def simulators(self) -> list[str]:
        if not self.engines:
            raise NeedsSimulator
        return self.engines

    def controlplane(self) -> str:
        """host:port of its control plane."""
        self.simulators()
        return json.loads(os.environ["PENSTOCK_UP"])["controlplane"]

    def truth(self, path: str, body: dict) -> dict | None:
        """What an engine answers to `body` when it is asked directly: simulated tokens follow from the request alone."""
        return ask(self.engines[0], "POST", path, {"model": self.model, **body}) if self.engines else None

    def chat_text(self, prompt: str, tokens: int) -> str | None:
        """The text of the answer to `prompt` in `tokens` tokens."""
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        answer = self.truth("/v1/chat/completions", body)
        return answer and answer["choices"][0]["message"]["content"]

    def same_text(self, got: str, prompt: str, tokens: int) -> None:
        wanted = self.chat_text(prompt, tokens)
        assert got, "no text"
        assert wanted in (None, got), f"the engine says {wanted!r}, the client got {got!r}"

    @contextlib.contextmanager
    def faults(self, *faults: dict) -> Iterator[None]:
        """These faults on every engine."""
        try:
            for engine in self.simulators():
                ask(engine, "POST", "/sim/faults", list(faults))
            yield
        finally:
            for engine in self.engines:
                ask(engine, "DELETE", "/sim/faults")

    def state(self, key: str) -> int:
        """A count of /sim/state, over all engines."""
        return sum(ask(engine, "GET", "/sim/state")[key] for engine in self.simulators())

    def until_idle(self) -> None:
        """No engine works on anything any more."""
        deadline = time.monotonic() + SETTLE_S
        while busy := self.state("in_flight") + self.state("running") + self.state("waiting"):
            assert time.monotonic() < deadline, f"{busy} requests still run {SETTLE_S} s after their client left"
            time.sleep(0.01)


def until(condition: Callable[[], bool]) -> None:
    """Waits for what a control plane has been told to be so."""
    deadline = time.monotonic() + SETTLE_S
    while not condition():
        assert time.monotonic() < deadline, f"not so within {SETTLE_S} s"
        time.sleep(0.02)


def expect_raise(kind: type[BaseException], call: Callable[[], object]) -> BaseException:
    """The error of exactly this class that `call` ends with."""
    try:
        answer = call()
    except Exception as error:  # noqa: BLE001 # which class it is, is what is checked
        assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}"
        return error
    raise AssertionError(f"answered instead of {kind.__name__}: {answer!r}")


def main(doc: str, connect: Callable[[Gateway], object], checks: dict[str, Callable[[object, Gateway], str]]) -> int:
    """Runs `checks`, one line each; exit code 1 if any failed, 2 for wrong usage.

    Arguments: [BASE_URL [MODEL]], else BASE_URL, MODEL and API_KEY of the environment. BASE_URL is without /v1. Without MODEL
    the first model listed is used. SKIP="name;name" leaves checks out, and says so.
    """
    arguments = sys.argv[1:]
    url = (arguments[0] if arguments else os.environ.get("BASE_URL", "")).rstrip("/")
    if not url or len(arguments) > 2:
        print(doc, main.__doc__, sep="\n", file=sys.stderr)
        return 2
    key = os.environ.get("API_KEY") or "none"
    model = arguments[1] if len(arguments) > 1 else os.environ.get("MODEL", "")
    if not model:
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            model = json.load(answer)["data"][0]["id"]
    up = json.loads(os.environ.get("PENSTOCK_UP") or "{}")
    engines = [engine["address"] for engine in up.get("engines", [])] if up.get("public", "-") in url else []
    gateway = Gateway(url, model, key, engines if all(map(is_simulated, engines)) else [])
    client = connect(gateway)
    skipped = [name for name in os.environ.get("SKIP", "").split(";") if name]
    if unknown := [name for name in skipped if name not in checks]:
        print(f"note    no check is called {', '.join(unknown)}")
    failed = 0
    for name, check in checks.items():
        if name in skipped:
            print(f"skipped {name}")
            continue
        try:
            print(f"ok      {name}: {check(client, gateway)}", flush=True)
        except NeedsSimulator:
            print(f"skipped {name}: needs simulated engines")
        except Exception as error:  # noqa: BLE001 # whatever a client raises is a failed check, not the end of the run
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc(limit=-4, file=sys.stdout)
    return 1 if failed else 0
