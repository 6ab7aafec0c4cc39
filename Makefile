# The one entrance for people and for CI: `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Flags of `penstock up`: make up ARGS="--engines 2 --ports auto"
ARGS ?=
# How long `make drill-resume` kills engines.
DRILL_SECONDS ?= 60
# Where `make bench` keeps the gateways that it compares with.
PEERS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/penstock/peers
# What `make load-*` talks to.
# What `make load-*` does, and what it talks to; docs/load-tools.md has the other settings.
SCRIPT ?= smoke
RECIPE ?= chat
BASE_URL ?= http://127.0.0.1:8081
MODEL ?=
API_KEY ?=
export BASE_URL MODEL API_KEY

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup-build setup-test
setup-build:
	@scripts/setup.sh build
setup-test:
	@scripts/setup.sh test

.PHONY: build
build: setup-build ## build target/release/penstock
	$(CARGO) build --locked --release -p penstock

.PHONY: up
up: build ## build and run a whole Penstock on this machine; flags in ARGS="..."
	@exec "$(TARGET)/release/penstock" up $(ARGS)

.PHONY: test
test: setup-test ## every test: Rust, documentation examples, real clients and tools
	@scripts/test.sh

.PHONY: check
check: setup-test ## formatting, lints, scripts, licences and banned crates
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	shellcheck .ci/run scripts/*.sh deploy/*.sh loadtest/oha/*.sh tests/clients/*.sh
	@scripts/deny.sh --if-installed

.PHONY: deny
deny: setup-build ## licences, banned and duplicate crates; installs cargo-deny if it is missing
	@scripts/deny.sh

.PHONY: fuzz
fuzz: setup-build ## coverage-guided tests of what reads bytes from outside; FUZZ_SECONDS=60 for each target
	@scripts/fuzz.sh

.PHONY: doc
doc: setup-build ## the API documentation; every warning is an error
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps

.PHONY: load-k6
load-k6: ## k6 against a running gateway: SCRIPT=smoke, ramp, spike or soak; BASE_URL, MODEL, API_KEY
	@[[ "$(SCRIPT)" =~ ^(smoke|ramp|spike|soak)$$ ]] || { echo "SCRIPT is $(SCRIPT); there are smoke, ramp, spike and soak" >&2; exit 2; }
	@scripts/setup.sh test
	.venv/bin/k6 run --no-usage-report "loadtest/k6/$(SCRIPT).js"

.PHONY: load-oha
load-oha: ## oha against a running gateway: RECIPE=chat, stream, big-body, rate or ramp; BASE_URL, MODEL, API_KEY
	@[[ "$(RECIPE)" =~ ^(chat|stream|big-body|rate|ramp)$$ ]] || { echo "RECIPE is $(RECIPE); there are chat, stream, big-body, rate and ramp" >&2; exit 2; }
	@"loadtest/oha/$(RECIPE).sh"

.PHONY: count
count: setup-test ## instructions of an event and of a request, against the pinned ones; docs/instructions.md; flags in ARGS="..."
	@scripts/count.sh $(ARGS)

.PHONY: bench
bench: setup-build ## Penstock and its peers side by side, see docs/benchmarks.md; flags in ARGS="--quick"
	$(CARGO) build --locked --profile dist -p penstock-proxy --bin penstock-proxy
	$(CARGO) build --locked --release -p penstock-loadtest --bin penstock-bench --bin penstock-relay --bin penstock-engine-sim
	@scripts/bench_peers.sh "$(PEERS)"
	@"$(TARGET)/release/penstock-bench" --proxy "$(TARGET)/dist/penstock-proxy" --peers-dir "$(PEERS)" \
		--json "$(TARGET)/bench/$$(date +%Y%m%dT%H%M%S).json" $(ARGS)

.PHONY: bench-report
bench-report: ## what `make bench` has measured, into docs/benchmarks.md
	@"$(TARGET)/release/penstock-bench" --from $(TARGET)/bench/*.json --write docs/benchmarks.md

.PHONY: bench-updates
bench-updates: setup-build ## what table updates cost the streams of a proxy, see docs/benchmarks.md; flags in ARGS="..."
	$(CARGO) build --locked --release -p penstock-proxy -p penstock-loadtest --bin penstock-proxy --bin penstock-bench-updates
	@"$(TARGET)/release/penstock-bench-updates" --proxy "$(TARGET)/release/penstock-proxy" $(ARGS)

.PHONY: bench-fanout
bench-fanout: setup-build ## what it costs a control plane to tell many proxies of changes, see docs/benchmarks.md; flags in ARGS="..."
	$(CARGO) build --locked --release -p penstock-controlplane -p penstock-loadtest --bin penstock-controlplane --bin penstock-bench-fanout
	@"$(TARGET)/release/penstock-bench-fanout" --controlplane "$(TARGET)/release/penstock-controlplane" $(ARGS)

.PHONY: bench-resume
bench-resume: setup-build ## what it costs a proxy to be ready to continue streams, see docs/benchmarks.md; flags in ARGS="..."
	$(CARGO) build --locked --release -p penstock-proxy -p penstock-loadtest --bin penstock-proxy --bin penstock-engine-sim --bin penstock-bench-resume
	@"$(TARGET)/release/penstock-bench-resume" --proxy "$(TARGET)/release/penstock-proxy" --engine-sim "$(TARGET)/release/penstock-engine-sim" $(ARGS)

.PHONY: bench-scale
bench-scale: setup-build ## how a proxy's CPU and memory grow, and the model of it, see docs/scaling.md; flags in ARGS="..."
	$(CARGO) build --locked --release -p penstock-proxy -p penstock-loadtest --bin penstock-proxy --bin penstock-engine-sim --bin penstock-bench-scale
	@"$(TARGET)/release/penstock-bench-scale" --proxy "$(TARGET)/release/penstock-proxy" --engine-sim "$(TARGET)/release/penstock-engine-sim" $(ARGS)

.PHONY: drill-resume
drill-resume: setup-build ## a thousand streams while engines are killed for a minute, see docs/drills.md; DRILL_SECONDS=60
	PENSTOCK_DRILL_SECONDS=$(DRILL_SECONDS) $(CARGO) test --locked -p penstock --test drill_resume_storm -- --nocapture

.PHONY: dist
dist: setup-build ## the binary that is shipped: slower to build, faster to run
	$(CARGO) build --locked --profile dist -p penstock
	@ls -l "$(TARGET)/dist/penstock"

.PHONY: clean
clean: ## remove what was built, .venv and node_modules
	$(CARGO) clean
	rm -rf .venv tests/clients/node_modules
