"""A stock Envoy in front of the engines of a `penstock up`, configured by its control plane alone.

    scripts/envoy.sh [delta|sotw]...      sets everything up and runs this

Once per protocol (the argument): an Envoy is started with a bootstrap that names nothing but the control plane. Clients chat
through it all the time, unary and in streams, while the fleet is scaled up, an endpoint is drained, and the fleet is scaled down:
no request may fail. Then a pool comes whose engines are registered under a host name, which an Envoy refuses in assignments:
the control plane shows who refused what and why, and everything else goes on. Needs Python's standard library alone, and the
program that ENVOY names.
"""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

UP = json.loads(os.environ["PENSTOCK_UP"])
MODEL = os.environ["MODEL"]
LISTEN = os.environ["PENSTOCK_CONTROLPLANE__XDS__ENVOY__LISTEN"]
PENSTOCK = os.environ["PENSTOCK_BIN"]
# Generous: the machine may be busy with other tests.
SETTLE_S = 90
CLIENTS = 6
TOKENS = 24


def api(method: str, path: str, body: object = None) -> dict:
    """One call of the control plane's API."""
    request = urllib.request.Request(
        f"http://{UP['controlplane']}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def until(what: str, condition: Callable[[], object]) -> object:
    deadline = time.monotonic() + SETTLE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {SETTLE_S} s: {what}"
        time.sleep(0.05)
    return found


def send(body: object, path: str = "/v1/chat/completions", kind: str = "application/json") -> tuple[int, bytes]:
    """One request to the Envoy."""
    connection = http.client.HTTPConnection(LISTEN, timeout=60)
    with contextlib.closing(connection):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()


def chat(model: str, stream: bool) -> None:
    """One answer, whole: an exception says what it lacks."""
    messages = [{"role": "user", "content": "Say something."}]
    body = {"model": model, "messages": messages, "max_tokens": TOKENS, "stream": stream}
    status, answer = send(body)
    assert status == 200, f"status {status}: {answer[:300]!r}"
    if stream:
        assert answer.rstrip().endswith(b"data: [DONE]"), f"a stream that broke off: {answer[-200:]!r}"
    else:
        assert json.loads(answer)["usage"]["completion_tokens"] == TOKENS, answer


class Load(threading.Thread):
    """Clients that chat until they are told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()
        self.answers = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self.client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def client(self, number: int) -> None:
        stream = number % 2 == 0
        while not self.over.is_set():
            try:
                chat(MODEL, stream)
                self.answers["stream" if stream else "unary"] += 1
            except Exception as error:  # noqa: BLE001 # whatever it is, a request has failed
                self.failures.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}")

    def check(self, after: str) -> None:
        """Nothing has failed, and both kinds of requests went through since the last check."""
        before = Counter(self.answers)
        until(
            f"requests after {after}",
            lambda: self.failures or all(self.answers[kind] > before[kind] + 3 for kind in ("stream", "unary")),
        )
        assert not self.failures, f"{len(self.failures)} requests failed by {after}: {self.failures[:3]}"
        print(f"ok      {after}: {sum(self.answers.values())} answers, none failed", flush=True)


@contextlib.contextmanager
def load() -> Iterator[Load]:
    running = Load()
    running.start()
    try:
        yield running
    finally:
        running.over.set()
        running.join()


def bootstrap(protocol: str, folder: Path) -> Path:
    host, port = UP["grpc"].rsplit(":", 1)
    service = {"envoy_grpc": {"cluster_name": "controlplane"}}
    address = {"socket_address": {"address": host, "port_value": int(port)}}
    api_type = {"delta": "DELTA_GRPC", "sotw": "GRPC"}[protocol]
    http2 = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    config = {
        "node": {"id": f"envoy-{protocol}", "cluster": "envoys", "locality": {"zone": "z1"}},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        "dynamic_resources": {
            "ads_config": {"api_type": api_type, "transport_api_version": "V3", "grpc_services": [service]},
            "cds_config": {"resource_api_version": "V3", "ads": {}},
            "lds_config": {"resource_api_version": "V3", "ads": {}},
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "controlplane",
                    "type": "STATIC",
                    "connect_timeout": "2s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": http2,
                            "explicit_http_config": {
                                "http2_protocol_options": {
                                    "connection_keepalive": {"interval": "5s", "timeout": "5s"}
                                }
                            },
                        }
                    },
                    "load_assignment": {
                        "cluster_name": "controlplane",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
                    },
                }
            ]
        },
    }
    path = folder / "envoy.json"
    path.write_text(json.dumps(config))
    return path


@contextlib.contextmanager
def envoy(protocol: str, folder: Path) -> Iterator[None]:
    """Until it answers; its log is printed if anything fails."""
    log = folder / "envoy.log"
    with log.open("wb") as out:
        command = [os.environ["ENVOY"], "-c", str(bootstrap(protocol, folder)), "--concurrency", "2"]
        running = subprocess.Popen(
            [*command, "--use-dynamic-base-id", "--log-level", "warn"], stdout=out, stderr=out
        )
    try:
        def answers() -> bool:
            assert running.poll() is None, f"envoy has ended with exit code {running.returncode}"
            try:
                chat(MODEL, False)
            except (OSError, AssertionError, http.client.HTTPException):
                return False
            return True

        until("an Envoy that serves", answers)
        yield
        assert running.poll() is None, f"envoy has ended with exit code {running.returncode}"
    except BaseException:
        print("--- envoy logged:", *log.read_text(errors="replace").splitlines()[-40:], sep="\n", file=sys.stderr)
        raise
    finally:
        running.terminate()
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def subscriber(node_id: str) -> dict:
    proxies = api("GET", "/api/v2/proxies")["proxies"]
    return next((proxy for proxy in proxies if proxy["node_id"] == node_id), {})


def endpoints(model: str, state: str) -> list[str]:
    found = api("GET", "/api/v2/endpoints")["endpoints"]
    return [endpoint["id"] for endpoint in found if endpoint["model"] == model and endpoint["state"] == state]


def scale(replicas: int) -> None:
    api("PATCH", f"/api/v2/deployments/{MODEL}", {"replicas": replicas})
    until(f"{replicas} replicas", lambda: len(endpoints(MODEL, "ready")) == replicas)


@contextlib.contextmanager
def named_engines(folder: Path) -> Iterator[None]:
    """An agent that registers its engines under a host name, and a model on it."""
    settings = folder / "agent.toml"
    settings.write_text(
        f"""
        node_id = "named"
        state_dir = "{folder}/agent"
        labels = {{ named = "yes" }}
        private = {{ listen = "127.0.0.1:0" }}
        controlplane = {{ endpoints = ["http://{UP['grpc']}"] }}
        gpus = {{ source = "simulated", simulated_count = 1 }}
        [engines]
        advertise_host = "localhost"
        port_base = 0
        drain_ms = 1000
        [engines.sim]
        command = ["{PENSTOCK}", "engine-sim"]
        """
    )
    with (folder / "agent.log").open("wb") as log:
        agent = subprocess.Popen([PENSTOCK, "agent", "--config", str(settings)], stdout=log, stderr=log)
    try:
        placement = {"node_selector": {"named": "yes"}}
        api("PUT", "/api/v2/deployments/named", {"engine": "sim", "replicas": 1, "placement": placement})
        until("the engine with a name", lambda: endpoints("named", "ready"))
        yield
        api("DELETE", "/api/v2/deployments/named")
        until("its end", lambda: not endpoints("named", "ready") and not endpoints("named", "draining"))
    finally:
        agent.terminate()
        agent.wait(60)


def answers_in_words() -> None:
    status, answer = send({"model": "nobody", "messages": []})
    assert status == 404 and json.loads(answer)["error"]["code"] == "model_not_found", (status, answer)
    status, answer = send(b"{", kind="application/json; charset=utf-8")
    assert status == 404 and b"names no model" in answer, (status, answer)
    status, answer = send({"model": MODEL}, path="/v1/load_lora_adapter")
    assert status == 404 and b"nothing at this path" in answer, (status, answer)
    with urllib.request.urlopen(f"http://{LISTEN}/v1/models", timeout=30) as listing:
        assert [model["id"] for model in json.load(listing)["data"]] == [MODEL]
    large = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "word " * 200_000}]}
    status, answer = send(large)
    assert status in (200, 400), f"a body of a megabyte: {status} {answer[:200]!r}"
    print("ok      what it does not serve is answered in words", flush=True)


def refuses_and_carries_on(name: str, running: Load, folder: Path) -> None:
    with named_engines(folder):
        shown = until("the refusal", lambda: "named" in str(subscriber(name).get("types")) and subscriber(name))
        refusal = shown["types"]["endpoint_assignment"]
        assert refusal["refused"] == ["named"] and refusal["nacks"] >= 1, shown
        assert "localhost" in refusal["last_nack"] and shown["last_nack"], shown
        told = subprocess.run(
            [PENSTOCK, "proxies", "--controlplane", f"http://{UP['controlplane']}"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        assert name in told and "localhost" in told, told
        with urllib.request.urlopen(f"http://{UP['controlplane']}/metrics", timeout=30) as metrics:
            lines = metrics.read().decode().splitlines()
        nacks = next(line for line in lines if 'xds_nacks_total{type="endpoint_assignment"}' in line)
        assert float(nacks.split()[-1]) >= 1, nacks
        running.check("a resource that it refuses")
        scale(2)
        running.check("a change after a refusal")
        scale(1)
    until("that nothing is refused any more", lambda: not subscriber(name)["types"]["endpoint_assignment"]["refused"])


def check(protocol: str) -> None:
    name = f"envoy-{protocol}"
    with tempfile.TemporaryDirectory(prefix="penstock-envoy-") as made:
        folder = Path(made)
        with envoy(protocol, folder), load() as running:
            shown = subscriber(name)
            assert shown["agent"].startswith("envoy/"), shown
            assert shown["protocol"] == {"delta": "delta", "sotw": "state_of_the_world"}[protocol], shown
            running.check(f"{protocol}: the start")
            answers_in_words()
            scale(3)
            running.check("scaling up")
            drained = endpoints(MODEL, "ready")[0]
            api("POST", f"/api/v2/endpoints/{drained}/drain")
            until("the drain", lambda: drained in endpoints(MODEL, "draining"))
            running.check("a drain")
            api("POST", f"/api/v2/endpoints/{drained}/undrain")
            running.check("its end")
            scale(1)
            running.check("scaling down")
            refuses_and_carries_on(name, running, folder)
            running.check("all of it")
            assert not running.failures, running.failures
    until("its subscription's end", lambda: not subscriber(name))


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ["delta", "sotw"]:
        check(chosen)
