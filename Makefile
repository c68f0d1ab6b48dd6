# Two commands do all set-up: `make demo` and `make test`.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",)
STAMPS := $(VENV)/.make
CODE := safer_engine service workers cli tests benchmarks deploy
SHELL_SCRIPTS := .ci/run $(sort $(shell find deploy tests -name '*.sh' -o -name '*.sbatch'))
export UV_COMPILE_BYTECODE := 1
# Tests run side by side: one thread each is faster than all of them fighting for the cores. Full tests mostly wait: one more of them fits.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(if $(CI),SAFER_REQUIRE_ALL=1,)

.PHONY: help demo test check chart quick test-full bench format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

$(STAMPS)/base:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	mkdir -p $(STAMPS) && touch $@

# torch comes first and alone: anything that depends on it would otherwise bring the registry's largest build.
$(STAMPS)/torch: $(STAMPS)/base
	$(UV) $(if $(PIP_FIND_LINKS),,--torch-backend=auto) "$(TORCH)" || $(UV) "$(TORCH)"
	touch $@

$(STAMPS)/engine: $(STAMPS)/torch pyproject.toml constraints.txt
	$(UV) -c constraints.txt -e '.[engine]'
	touch $@

$(STAMPS)/dev: $(STAMPS)/engine
	$(UV) -c constraints.txt -e '.[all,dev]'
	touch $@

$(STAMPS)/bench: $(STAMPS)/dev
	$(UV) -c constraints.txt -e '.[all,dev,bench]'
	touch $@

$(STAMPS)/browser: tests/install_browser.sh
	mkdir -p $(STAMPS) && bash tests/install_browser.sh && touch $@

$(STAMPS)/chart: $(STAMPS)/base tests/install_chart_tools.sh tests/deploy/tools/package-lock.json
	$(TEST_ENV) bash tests/install_chart_tools.sh $(VENV)/tools && touch $@

$(STAMPS)/servers: tests/install_servers.sh
	mkdir -p $(STAMPS) && bash tests/install_servers.sh && touch $@

$(STAMPS)/mlflow: $(STAMPS)/base tests/install_mlflow.sh
	$(TEST_ENV) bash tests/install_mlflow.sh $(VENV)/mlflow $(BIN)/python && touch $@

demo: $(STAMPS)/engine ## an audit of a small reward model with planted wrong labels, ending with the report's path
	$(BIN)/safer-audit demo

check: $(STAMPS)/dev $(STAMPS)/chart ## format, lint, types, layers, Dockerfiles, scripts, CI files, the Helm chart, alerts and dashboard
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile.gpu Dockerfile.service
	$(BIN)/shellcheck $(SHELL_SCRIPTS)
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 tests/deploy

chart: $(STAMPS)/dev $(STAMPS)/chart ## rewrite what follows from the Helm chart: tables, schema, golden renders
	$(BIN)/python -m tests.deploy.generate

quick: $(STAMPS)/dev ## quick tests, with the coverage floor of the scientific core
	rm -f .coverage .coverage.*
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 -m "not full and not gpu and not deploy" --cov --cov-report=
	$(BIN)/python -m coverage report --skip-covered --fail-under=90 \
		--include='safer_engine/science/*,safer_engine/stage.py,safer_engine/store.py'

test-full: $(STAMPS)/dev $(STAMPS)/browser $(STAMPS)/servers $(STAMPS)/mlflow ## real servers, faults, browser, fuzzing
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 3 --dist worksteal -m "full and not gpu"

test: check quick test-full ## everything; what CI runs

bench: $(STAMPS)/bench ## the speed benchmarks on this machine, one table each
	$(BIN)/python -m benchmarks.extraction
	$(BIN)/python -m benchmarks.sae_step
	$(BIN)/python -m benchmarks.audit

format: $(STAMPS)/dev ## rewrite the code in the house format
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage build dist *.egg-info
