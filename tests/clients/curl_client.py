#!/usr/bin/env python3
"""curl against a gateway, over every protocol it speaks: one line per check, exit code 1 if any failed.

    curl_client.py [BASE_URL [MODEL]]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import TIMEOUT_S, Gateway, main

# What curl is told, and the version of HTTP that it must then report.
PROTOCOLS = {
    "HTTP/1.1": (["--http1.1"], "1.1"),
    "HTTP/2 in clear": (["--http2-prior-knowledge"], "2"),
}
# The same gateway's address with TLS, and the authority of its certificate, where there are such.
TLS_URL, TLS_CA = os.environ.get("TLS_URL", ""), os.environ.get("TLS_CA", "")
if TLS_URL:
    PROTOCOLS["HTTP/1.1 over TLS"] = (["--http1.1", "--cacert", TLS_CA], "1.1")
    PROTOCOLS["HTTP/2 over TLS"] = (["--http2", "--cacert", TLS_CA], "2")
AT_ONCE = 20
TOKENS = 20


class Curl:
    """curl with the flags of one protocol."""

    def __init__(self, gateway: Gateway, flags: list[str], version: str) -> None:
        self.gateway, self.flags, self.version = gateway, flags, version
        self.url = TLS_URL if "--cacert" in flags else gateway.url

    def run(self, path: str, *more: str, body: bytes | None = None) -> tuple[int, str, str]:
        """Status, headers and body of the answer; curl itself must succeed with the right protocol."""
        command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", str(TIMEOUT_S), *self.flags]
        command += ["--header", f"Authorization: Bearer {self.gateway.key}", "--header", "Content-Type: application/json"]
        with tempfile.NamedTemporaryFile(mode="r") as headers:
            command += ["--dump-header", headers.name, "--write-out", "%{stderr}%{http_code} %{http_version}"]
            if body is not None:
                command += ["--data-binary", "@-"]
            ended = subprocess.run(
                [*command, *more, self.url + path], input=body or b"", capture_output=True, check=False
            )
            head = headers.read()
        says = ended.stderr.decode()
        assert ended.returncode == 0, f"curl ended with {ended.returncode}: {says}"
        status, version = says.split()
        assert version == self.version, f"HTTP/{version} instead of HTTP/{self.version}"
        return int(status), head, ended.stdout.decode()

    def chat(self, prompt: str, **more: object) -> bytes:
        messages = [{"role": "user", "content": prompt}]
        return json.dumps({"messages": messages, "max_tokens": TOKENS, **more, "model": self.gateway.model}).encode()


def text_of(stream: str) -> str:
    """The text of a chat's stream, which must be whole."""
    events = stream.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], f"not whole: {stream[-200:]!r}"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def check_models(curl: Curl, gateway: Gateway) -> str:
    status, head, body = curl.run("/v1/models")
    assert status == 200 and gateway.model in body, body
    assert "x-request-id:" in head.lower(), head
    return head.splitlines()[0].strip()


def check_chat(curl: Curl, gateway: Gateway) -> str:
    status, _, body = curl.run("/v1/chat/completions", body=curl.chat("Say something."))
    assert status == 200, body
    gateway.same_text(json.loads(body)["choices"][0]["message"]["content"], "Say something.", TOKENS)
    return f"{len(body)} bytes"


def check_stream(curl: Curl, gateway: Gateway) -> str:
    status, head, body = curl.run("/v1/chat/completions", body=curl.chat("Count to twenty.", stream=True))
    assert status == 200 and "text/event-stream" in head, head
    gateway.same_text(text_of(body), "Count to twenty.", TOKENS)
    return f"{body.count('data: ')} events"


def check_upload(curl: Curl, gateway: Gateway) -> str:
    """8 MB with the model last; over HTTP/1.1 curl asks with `Expect: 100-continue`, and once without a length."""
    body = curl.chat("x", padding="x" * (8 << 20))
    sent = [()] if curl.version == "2" else [(), ("--header", "Transfer-Encoding: chunked")]
    for how in sent:
        status, _, answer = curl.run("/v1/chat/completions", *how, body=body)
        assert status == 200, answer
        gateway.same_text(json.loads(answer)["choices"][0]["message"]["content"], "x", TOKENS)
    return f"{len(body)} bytes, {len(sent)} times"


def check_errors(curl: Curl, gateway: Gateway) -> str:
    for path, body, status, code in [
        ("/v1/chat/completions", curl.chat("x").replace(gateway.model.encode(), b"no-such-model"), 404, "model_not_found"),
        ("/v1/chat/completions", b'{"model":', 400, "invalid_json"),
        ("/v1/chat/completions", None, 405, "method_not_allowed"),
        ("/sim/state", None, 404, "unknown_url"),
    ]:
        got, _, answer = curl.run(path, body=body)
        assert (got, json.loads(answer)["error"]["code"]) == (status, code), f"{got}: {answer}"
    return "404, 400, 405"


def check_at_once(curl: Curl, gateway: Gateway) -> str:
    """Many streams of one curl, each on a connection of its own: curl 7.88 cannot share one that speaks HTTP/2 in clear."""
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder, "body")
        body.write_bytes(curl.chat("At once.", stream=True))
        outputs = [Path(folder, f"{index}") for index in range(AT_ONCE)]
        command = ["curl", "--silent", "--show-error", "--parallel", "--parallel-immediate"]
        command += ["--parallel-max", str(AT_ONCE)]
        for index, output in enumerate(outputs):
            command += ["--next"] if index else []
            command += [*curl.flags, "--header", f"Authorization: Bearer {gateway.key}"]
            command += ["--header", "Content-Type: application/json", "--data-binary", f"@{body}"]
            command += ["--max-time", str(TIMEOUT_S), "--output", str(output), f"{curl.url}/v1/chat/completions"]
            command += ["--write-out", "%{http_code} %{http_version}\n"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines() == [f"200 {curl.version}"] * AT_ONCE, ended.stdout
        for output in outputs:
            gateway.same_text(text_of(output.read_text()), "At once.", TOKENS)
    return "each its own text"


def check_leaving_early(curl: Curl, gateway: Gateway) -> str:
    body = curl.chat("Go on.", stream=True, max_tokens=4000, ignore_eos=True)
    try:
        curl.run("/v1/chat/completions", "--max-time", "0.3", body=body)
    except AssertionError as error:
        assert "ended with 28" in str(error), error
    else:
        raise AssertionError("4,000 tokens within 0.3 s")
    if gateway.engines:
        gateway.until_idle()
    return "the engine stopped" if gateway.engines else "left"


EACH = {
    "models": check_models,
    "chat": check_chat,
    "chat, streaming": check_stream,
    "large upload": check_upload,
    "bad requests": check_errors,
    f"{AT_ONCE} streams at once": check_at_once,
    "client leaves early": check_leaving_early,
}
CHECKS = {
    f"{protocol}: {name}": (lambda curls, gateway, protocol=protocol, check=check: check(curls[protocol], gateway))
    for protocol in PROTOCOLS
    for name, check in EACH.items()
}


def connect(gateway: Gateway) -> dict[str, Curl]:
    return {protocol: Curl(gateway, flags, version) for protocol, (flags, version) in PROTOCOLS.items()}


if __name__ == "__main__":
    sys.exit(main(__doc__, connect, CHECKS))
