#!/usr/bin/env python3
"""Compares the control plane's REST API with its own document, /openapi.json.

    scripts/check_api.py answers   what a running system answers to every read; under scripts/with_up.py (PENSTOCK_UP)
    scripts/check_api.py fuzz      schemathesis against a control plane of its own, closed by a token: FUZZ_API_SECONDS=60

`fuzz` fails on any 5xx, any answer that the document does not have, any field that its schemas lack, any bad request that is
accepted and any good one that is refused. The binary is $PENSTOCK_BIN, else target/debug/penstock. Runs in .venv.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-token-of-the-tests"
START_DEADLINE_S = 60
STOP_DEADLINE_S = 30

# A 400 to a request that fits the schema: rules between fields (max_surge and max_unavailable cannot both be 0), references
# (a route's targets must be there) and cursors, which no schema can say.
CONFIG = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "409", "412", "415", "422"]

# What a POST made can be gone by the next request: other tests delete too.
ensure_resource_availability.enabled = false

[generation]
deterministic = true

# A deployment with a history, which nothing else in the run names.
[[operations]]
include-operation-id = ["get_deployment", "list_revisions", "diff_revisions", "rollback", "wake_model", "patch_deployment"]
parameters = { "path.model" = "kept-for-reads" }
"""


def call(base: str, path: str, method: str = "GET", body: object = None) -> tuple[int, object]:
    request = urllib.request.Request(base + path, method=method, headers={"authorization": f"Bearer {TOKEN}"})
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("content-type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if "json" in answer.headers["content-type"] else text
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read().decode() or "null")


def answers() -> int:
    """Every GET of the document, with names that the lists give; each answer is held against its schema."""
    import jsonschema

    up = json.loads(os.environ["PENSTOCK_UP"])
    base = f"http://{up['controlplane']}"
    status, document = call(base, "/openapi.json")
    assert status == 200, document
    # Something of each kind.
    model = call(base, "/api/v2/deployments")[1]["deployments"][0]["model"]
    for method, path, body in [
        ("PATCH", f"/api/v2/deployments/{model}", {"paused": True}),
        ("PATCH", f"/api/v2/deployments/{model}", {"paused": False}),
        ("PUT", "/api/v2/routes/alias", {"targets": [{"model": model}], "fallbacks": []}),
        ("PUT", "/api/v2/deployments/other", {"replicas": 0, "engine": "sim", "autoscaling": {"max": 2}}),
        ("PUT", "/api/v2/deployments/other", {"replicas": 0, "engine": "sim", "lora": [{"name": "l", "path": "p"}]}),
    ]:
        status, answer = call(base, path, method, body)
        assert status in (200, 201), (path, answer)
    names = {
        "model": [model, "other"],
        "name": ["alias", model],
        "models": [e["id"] for e in call(base, "/api/v2/endpoints")[1]["endpoints"]],
        "endpoints": [e["id"] for e in call(base, "/api/v2/endpoints")[1]["endpoints"]],
        "nodes": [n["node_id"] for n in call(base, "/api/v2/nodes")[1]["nodes"]],
    }
    node = names["nodes"][0]
    status, answer = call(base, f"/api/v2/nodes/{node}", "PATCH", {"labels": {"rack": "7"}})
    assert status == 200, answer
    seen, failures = 0, []
    for path, operations in document["paths"].items():
        operation = operations.get("get")
        if operation is None:
            continue
        paths = [path]
        for name in ("model", "name", "id"):
            if f"{{{name}}}" in path:
                known = names.get(name) or names[path.split("/")[3]]
                paths = [part.replace(f"{{{name}}}", one) for part in paths for one in known]
        for one in paths:
            status, answer = call(base, one)
            documented = operation["responses"].get(str(status))
            if documented is None:
                failures.append(f"{one}: {status} is not documented: {answer}")
                continue
            if status >= 400 and not ("router" in one or "placements" in one or "diff" in one or "replicas" in one):
                failures.append(f"{one}: {status}: {answer}")
            schema = documented.get("content", {}).get("application/json", {}).get("schema")
            if schema:
                whole = {**schema, "components": document["components"]}
                for error in jsonschema.Draft202012Validator(whole).iter_errors(answer):
                    failures.append(f"{one}: {error.json_path}: {error.message}")
            seen += 1
    print(f"{seen} answers compared")
    print("\n".join(failures))
    return 1 if failures else 0


def fuzz() -> int:
    seconds = os.environ.get("FUZZ_API_SECONDS", "60")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    binary = os.environ.get("PENSTOCK_BIN") or str(target / "debug" / "penstock")
    tool = Path(sys.executable).parent / "schemathesis"
    with tempfile.TemporaryDirectory() as folder:
        announce, log = Path(folder, "announce.json"), Path(folder, "log")
        env = {
            **os.environ,
            "NEBULA_AUTH_TOKENS": f"{TOKEN}:admin",
            "NEBULA_AUTH_RATE_LIMIT_PER_MINUTE": "0",
            "PENSTOCK_CONTROLPLANE__OBSERVE__ROUTER_URL": "http://127.0.0.1:9",
        }
        arguments = ["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", "--data-dir", folder]
        with log.open("wb") as output:
            plane = subprocess.Popen(
                [binary, "controlplane", *arguments, "--announce", str(announce)], env=env, stdout=output, stderr=output
            )
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            while not announce.exists():
                if plane.poll() is not None or time.monotonic() > deadline:
                    print(log.read_text(errors="replace"), "the control plane does not start", sep="\n")
                    return 1
                time.sleep(0.05)
            base = f"http://{json.loads(announce.read_text())['http']}"
            for args in ([], ["--seed=1"], ["--seed=2"]):
                kept = {"replicas": 1, "engine": "sim", "args": args}
                assert call(base, "/api/v2/deployments/kept-for-reads", "PUT", kept)[0] < 300
            call(base, "/api/v2/deployments/m", "PUT", {"replicas": 0})
            call(base, "/api/v2/routes/r", "PUT", {"targets": [{"model": "m"}]})
            config = Path(folder, "schemathesis.toml")
            config.write_text(CONFIG)
            command = [tool, "--config-file", config, "run", f"{base}/openapi.json", "--max-time", seconds]
            command += ["--header", f"Authorization: Bearer {TOKEN}", "--checks", "all", "--no-color"]
            code = subprocess.run(command, cwd=folder, check=False).returncode
            if plane.poll() is not None:
                print("the control plane ended", log.read_text(errors="replace")[-4000:], sep="\n")
                return 1
            text = log.read_text(errors="replace")
            if "panicked" in text:
                print("the control plane panicked", text[-4000:], sep="\n")
                return 1
            return code
        finally:
            if plane.poll() is None:
                plane.send_signal(signal.SIGTERM)
                plane.wait(STOP_DEADLINE_S)


if __name__ == "__main__":
    modes = {"answers": answers, "fuzz": fuzz}
    if len(sys.argv) != 2 or sys.argv[1] not in modes:
        sys.exit(__doc__)
    sys.exit(modes[sys.argv[1]]())
