# `make help` lists what there is. Every target that needs an installation makes it first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test test-system soak bench lint format lock clean

# A non-login shell of root may lack the folders where ip, etcd and sysctl live.
export PATH := $(PATH):/usr/sbin:/sbin

BIN := .venv/bin
NODES ?= 3
BACKEND ?= vxlan
HOLD ?=
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
# Most tests wait for a daemon or for etcd: more of them at a time than there are processors.
WORKERS ?= 3
BENCH_FLAGS ?= --leases 0,1000 --rounds 3
FLANNELD ?=
PYTHON ?= python3
SCRIPTS := scripts/*.sh deploy/image/*.sh deploy/image/install-conf .ci/run

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "make demo NODES=5        another number of nodes (2 to 20)"
	@echo "make demo BACKEND=udp    another way to carry packets (vxlan, host-gw, udp)"
	@echo "make demo HOLD=1         leave the nodes up until Ctrl-C, to look around"
	@echo "make test PYTEST_FLAGS='-k vxlan -x'"

install: ## bring this machine what is missing, and make .venv
	@PYTHON='$(PYTHON)' scripts/install.sh

demo: install ## nodes in network namespaces here, pods that ping across (root)
	@$(BIN)/flannelpy demo --nodes $(NODES) --backend $(BACKEND) $(if $(HOLD),--hold) $(DEMO_FLAGS)

test: ## linters, types and every test (root for those in network namespaces)
	@PYTHON='$(PYTHON)' HOSTS=containers scripts/install.sh || PYTHON='$(PYTHON)' scripts/install.sh
	@$(MAKE) --no-print-directory lint
	$(BIN)/pytest --numprocesses=$(WORKERS) --dist=loadscope $(PYTEST_FLAGS)

test-system: ## two Debian hosts with systemd and Docker, as containers and emulated (root; minutes)
	@PYTHON='$(PYTHON)' HOSTS=all scripts/install.sh || PYTHON='$(PYTHON)' scripts/install.sh
	$(BIN)/pytest -m 'emulated or not emulated' -s -rs tests/system $(PYTEST_FLAGS)

soak: install ## thousands of leases that come and go for minutes: does anything grow? (root)
	$(BIN)/pytest -m soak -s tests/soak $(PYTEST_FLAGS)

lint: install ## ruff and mypy; shellcheck where it is installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then set -x; shellcheck $(SCRIPTS); fi

format: install ## let ruff lay out the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install ## measure starts and changes; FLANNELD=/path/to/flanneld to compare with it (root)
	@$(BIN)/python bench/control_plane.py $(BENCH_FLAGS) \
	    --daemon ours='$(CURDIR)/$(BIN)/flannelpy --iptables-forward-rules=false' \
	    $(if $(FLANNELD),--daemon flannel='$(FLANNELD) --iptables-forward-rules=false')

lock: ## choose the newest versions that fit pyproject.toml into requirements/*.lock
	@scripts/lock.sh --upgrade

clean: ## remove what make has made, .venv too
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
