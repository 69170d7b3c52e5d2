# `make demo` and `make test` do everything, set-up included. `make help` lists
# the rest. What is slow to build is cached below $(BULKHEAD_CACHE), by the
# content of its inputs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BULKHEAD_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bulkhead
export BULKHEAD_CACHE

# Outside the checkout, so that a fresh clone does not compile its dependencies
# again; one for each set of them and each compiler.
toolchain := $(shell { cat Cargo.lock; cargo --version; } 2>/dev/null | sha256sum | cut -c1-16)
export CARGO_TARGET_DIR ?= $(BULKHEAD_CACHE)/target/$(toolchain)
ifneq ($(filter-out help,$(MAKECMDGOALS)),)
claimed := $(shell CARGO_TARGET_DIR=$(CARGO_TARGET_DIR) tests/claim-target)
ifneq ($(.SHELLSTATUS),0)
$(error tests/claim-target failed for $(CARGO_TARGET_DIR))
endif
endif

DENY_VERSION := 0.20.2
DENY := $(BULKHEAD_CACHE)/cargo-deny-$(DENY_VERSION)/bin/cargo-deny
PREFIX := $(BULKHEAD_CACHE)/prefix
E2E_TIMEOUT ?= 3300
# How many nodes the end-to-end tests share.
NODES ?= 2

step = @printf '\n=== %s\n' '$(1)'
builder = cargo run --quiet --release --package rootfs-builder --bin rootfs-builder --
node = cargo run --quiet --release --package bulkhead-node --bin bulkhead-node --

.PHONY: help
help: ## Lists the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# --- set-up ---------------------------------------------------------------

.PHONY: setup
setup: ## Installs the Debian packages that the build needs (root)
	$(call step,Debian packages that the build needs)
	@tests/setup

.PHONY: cache
cache: setup ## Fills the cache: kernel, tools, node image (20-30 min on 2 cores)
	$(call step,filling $(BULKHEAD_CACHE): build root, guest kernel, virtiofsd, Go tools, node)
	@cargo build --quiet --release --package rootfs-builder --package bulkhead-node
	@$(builder) kernel >/dev/null
	@$(builder) virtiofsd >/dev/null
	@$(builder) image busybox >/dev/null
	@$(builder) image pause >/dev/null
	@$(node) build

.PHONY: install
install: ## Lays the product out below the cache's prefix/
	$(call step,product)
	@$(builder) install $(PREFIX)

# --- to use ---------------------------------------------------------------

.PHONY: demo
demo: cache install ## Runs a container in its own VM, in a node
	$(call step,demo)
	@tests/demo

.PHONY: node
node: cache install ## Opens a shell in a node with Bulkhead installed
	@$(node) up shell --share $(PREFIX)
	@$(node) shell shell; $(node) down shell

# --- to test --------------------------------------------------------------

.PHONY: test
test: ## Everything that must hold before a change lands
	@$(MAKE) setup
	@$(MAKE) lint
	@$(MAKE) cache
	@$(MAKE) install
	@$(MAKE) unit reproducible node-test e2e critest
	@printf '\nall tests passed\n'

.PHONY: lint
lint: $(DENY) ## Formatting, lints, dependencies, documentation
	$(call step,format)
	cargo fmt --all --check
	shellcheck .ci/run tests/setup tests/demo tests/claim-target tests/fuzz/run tests/fuzz/instrumented-rustc guest-kernel-config/build examples/*.sh examples/crictl/run.sh
	$(call step,lints)
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(call step,dependencies)
	@tests/deny $(DENY)
	$(call step,documentation)
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --document-private-items --quiet

# Not optimised: that takes longer than it saves.
$(DENY):
	$(call step,cargo-deny $(DENY_VERSION) (once about 3 min))
	@cargo install --quiet --locked --debug --version $(DENY_VERSION) --root $(BULKHEAD_CACHE)/cargo-deny-$(DENY_VERSION) cargo-deny

.PHONY: unit
unit: ## Unit tests and properties
	$(call step,unit tests)
	BULKHEAD_TEST_LIBEXEC=$(PREFIX)/libexec/bulkhead BULKHEAD_VIRTIOFSD=$(PREFIX)/libexec/bulkhead/virtiofsd \
		cargo test --workspace --exclude bulkhead-e2e --quiet

# Seconds for each target.
FUZZ_SECONDS ?= 60

.PHONY: fuzz
fuzz: ## Looks for inputs that break a parser, FUZZ_SECONDS=60 for each target
	$(call step,fuzz targets)
	@tests/fuzz/run $(FUZZ_SECONDS) $(FUZZ_TARGETS)

.PHONY: reproducible
reproducible: ## The same inputs give the same bytes
	$(call step,reproducible builds)
	$(builder) reproducible

.PHONY: node-test
node-test: ## The test node itself
	$(call step,tests of the node)
	cargo test --package bulkhead-node --test node --quiet -- --ignored --test-threads=1

.PHONY: e2e
e2e: ## End-to-end tests through containerd, in nodes
	$(call step,end-to-end tests)
	BULKHEAD_PREFIX=$(PREFIX) timeout --foreground $(E2E_TIMEOUT) cargo test --package bulkhead-e2e -- --test-threads=$(NODES) --nocapture

.PHONY: soak
soak: cache install ## The end-to-end tests with their full counts
	$(call step,soak)
	BULKHEAD_SOAK=1 BULKHEAD_PREFIX=$(PREFIX) cargo test --package bulkhead-e2e -- --test-threads=$(NODES) --nocapture

.PHONY: critest
critest: ## A fixed part of critest, with Bulkhead
	$(call step,a fixed part of critest)
	@BULKHEAD_PREFIX=$(PREFIX) timeout --foreground 900 cargo run --quiet --package bulkhead-conformance -- \
		--nodes $(NODES) --runtimes bulkhead --subset

.PHONY: conformance
conformance: cache install ## critest with runc and with Bulkhead, compared (about an hour when emulated)
	$(call step,conformance)
	@BULKHEAD_PREFIX=$(PREFIX) cargo run --quiet --release --package bulkhead-conformance -- --nodes $(NODES) $(CONFORMANCE_ARGUMENTS)

# Static, because they run in the node whatever the libraries here.
bench_target = $(CARGO_TARGET_DIR)/static/x86_64-unknown-linux-gnu/release

.PHONY: bench
bench: cache install ## Start-up times as ratios, in one node
	$(call step,bench)
	@RUSTFLAGS='-C target-feature=+crt-static' cargo build --quiet --release --target x86_64-unknown-linux-gnu \
		--target-dir $(CARGO_TARGET_DIR)/static --package bulkhead-bench --bin bench-in-node --bin bench-init
	@cargo run --quiet --release --package bulkhead-bench --bin bulkhead-bench -- --prefix $(PREFIX) \
		--in-node $(bench_target)/bench-in-node --init $(bench_target)/bench-init $(BENCH_ARGUMENTS)
