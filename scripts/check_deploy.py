#!/usr/bin/env python3
"""Checks that the files of deploy/ agree with each other and with the settings, as far as can be told without Docker.

compose.yaml: every PENSTOCK_ variable names a key of config/*.toml; every volume, dependency and mounted file exists;
no port of the host is taken twice; health checks ask a port that the service listens on. prometheus.yml: every target is
a service of compose.yaml. Dockerfile and .dockerignore: what is copied exists and is not ignored. Needs .venv.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
problems: list[str] = []


def expect(condition: object, problem: str) -> None:
    if not condition:
        problems.append(problem)


def load_yaml(path: Path) -> dict:
    return YAML(typ="safe").load(path.read_text())


def settings_keys(process: str) -> dict:
    return tomllib.loads((ROOT / "config" / f"{process}.toml").read_text())


def check_variable(service: str, name: str) -> None:
    """PENSTOCK_AGENT__ENGINES__BIND_HOST is [engines] bind_host of config/agent.toml."""
    match = re.fullmatch(r"PENSTOCK_(PROXY|CONTROLPLANE|AGENT)__(\w+)", name)
    if not match:
        problems.append(f"{service}: {name} is not PENSTOCK_<PROCESS>__<SECTION>__<KEY>")
        return
    process, path = match.group(1).lower(), match.group(2).lower().split("__")
    table: object = settings_keys(process)
    for key in path:
        if not isinstance(table, dict) or key not in table:
            problems.append(f"{service}: {name}: config/{process}.toml has no key {'.'.join(path)}")
            return
        table = table[key]


def check_compose(compose: dict) -> None:
    services, volumes, published = compose["services"], compose.get("volumes", {}), {}
    for name, service in services.items():
        ours = "build" in service
        for variable in service.get("environment", {}):
            if ours:
                check_variable(name, variable)
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                expect((DEPLOY / source).exists(), f"{name}: mounts {source}, which does not exist")
            else:
                expect(source in volumes, f"{name}: volume {source} is not declared")
        for other in service.get("depends_on", []):
            expect(other in services, f"{name}: depends on {other}, which is no service")
        for port in service.get("ports", []):
            address, host, _container = port.rsplit(":", 2)
            expect(address == "127.0.0.1", f"{name}: {port} is not on the loopback address")
            taken = published.setdefault(host, name)
            expect(taken == name, f"{name}: port {host} is published by {taken} too")
        test = service.get("healthcheck", {}).get("test", [])
        listens = [v.rsplit(":", 1)[1] for v in service.get("environment", {}).values() if re.search(r":\d+$", str(v))]
        if "penstock-healthcheck" in test:
            expect(test[-1] in listens, f"{name}: the health check asks port {test[-1]}, the service listens on {listens}")
    for volume in volumes:
        used = any(m.split(":")[0] == volume for s in services.values() for m in s.get("volumes", []))
        expect(used, f"volume {volume} is declared and not used")


def check_prometheus(prometheus: dict, services: dict) -> None:
    targets: list[str] = []
    for job in prometheus["scrape_configs"]:
        for static in job.get("static_configs", []):
            targets += static["targets"]
        for discovery in job.get("file_sd_configs", []):
            for pattern in discovery["files"]:
                files = sorted((DEPLOY / "prometheus").glob(pattern))
                expect(files, f"prometheus.yml: {job['job_name']}: no file matches {pattern}")
                for file in files:
                    targets += [t for group in json.loads(file.read_text()) for t in group["targets"]]
    for target in targets:
        expect(target.split(":")[0] in services, f"prometheus: {target} is no service of compose.yaml")


def check_dockerfile() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = set()
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            copied.update(line.split()[1:-1])
    for source in sorted(copied):
        expect((ROOT / source).exists(), f"Dockerfile: copies {source}, which does not exist")
        expect(source in allowed, f"Dockerfile: copies {source}, which .dockerignore leaves out")
    for source in sorted(allowed - copied):
        problems.append(f".dockerignore: lets {source} through, which the Dockerfile does not copy")
    members = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["members"]
    for member in members:
        expect(member in copied, f"Dockerfile: does not copy the crate {member}")


def main() -> int:
    compose = load_yaml(DEPLOY / "compose.yaml")
    check_compose(compose)
    check_prometheus(load_yaml(DEPLOY / "prometheus" / "prometheus.yml"), compose["services"])
    check_dockerfile()
    for path in sorted((DEPLOY / "grafana").rglob("*.yaml")):
        load_yaml(path)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(compose['services'])} services, their settings, mounts, ports and scrape targets agree")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
