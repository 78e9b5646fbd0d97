# Everything that a checkout can do. `make demo` and `make test` need nothing done before: they set up what they use.
# Needs: Python >= 3.11 with venv, a C++ compiler, make (Debian/Ubuntu: apt-get install python3-venv g++ make).

PYTHON ?= python3
PYTHON_GPU ?= python3.12
PY := .venv/bin/python
OUT ?= runs/gate
PYTEST := $(PY) -m pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-slow test-browser test-all soak gate compare lint format check-pins gpu-env legacy-env gpu-bundle clean

define need_python_gpu
	@command -v $(PYTHON_GPU) >/dev/null || { echo "error: no $(PYTHON_GPU) here; set PYTHON_GPU to a Python 3.12" >&2; exit 4; }
endef

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## .venv with the pinned CPU stack; llama.cpp compiled and a small model fetched once (~/.cache/forge, FORGE_CACHE)
	@$(PYTHON) scripts/set_up.py .venv requirements-cpu.txt --llama-cpp --project
	@$(PY) -m forge.training base smollm2 > /dev/null

demo: setup ## documents in, a GGUF out that answers what its base could not: PASS, or FAIL and exit code 8
	$(PY) -m forge.training run demo

test: setup ## the fast tests (at most 8 minutes on 2 cores)
	$(PYTEST)

test-slow: setup ## the slow tests alone
	$(PYTEST) -m "slow and not gpu and not network"
	$(PYTEST) -m network

test-browser: setup ## a report in Debian's chromium (apt-get install chromium)
	$(PYTEST) -m browser

test-all: test test-browser test-slow ## every test that needs no GPU (about an hour)

soak: setup ## kill training at every write, and training and export 50 times at random moments (runs/soak/soak.json)
	CRASH_POINTS=all $(PYTEST) tests/training/train/test_interruptions.py -m slow -k at_any_write
	$(PY) -m tests.support.random_kills

gate: ## the acceptance gate on this GPU: make gate TRAIN=corpus.train.jsonl [OUT=runs/gate] [SECONDS=N to resume later]
	@test -n "$(TRAIN)" || { echo "error: name the documents: make gate TRAIN=corpus.train.jsonl" >&2; exit 2; }
	@test -x .venv-gpu/bin/python || { echo "error: no .venv-gpu here; first: make gpu-env legacy-env" >&2; exit 4; }
	@mkdir -p $(OUT) && rm -f $(OUT)/benchmark.json $(OUT)/benchmark.json.partial
	@.venv-gpu/bin/python -m pytest -m gpu --gate-train "$(TRAIN)" --gate-store $(OUT)/store \
		$(if $(SECONDS),--gate-seconds $(SECONDS)) --benchmark-json $(OUT)/benchmark.json; \
	verdict=$$?; json=$(OUT)/benchmark.json; test -f $$json || json=$$json.partial; \
	.venv-gpu/bin/python -m harness.report $$json -o $(OUT) --store $(OUT)/store; exit $$verdict

compare: setup ## two results of the gate side by side: make compare A=old.json B=new.json
	@test -n "$(A)" -a -n "$(B)" || { echo "error: name two results: make compare A=old.json B=new.json" >&2; exit 2; }
	@$(PY) -m harness.compare "$(A)" "$(B)"

lint: setup ## ruff and mypy --strict
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	MYPYPATH=scripts $(PY) -m mypy scripts/*.py scripts/lab/*.py

format: setup ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

check-pins: ## resolve requirements-{gpu,legacy}.txt again, as a whole, for Linux and Python 3.12
	$(need_python_gpu)
	@$(PYTHON_GPU) scripts/check_pins.py requirements-gpu.txt requirements-legacy.txt

gpu-env: ## .venv-gpu: the fast stack, for a machine with an NVIDIA GPU and a network
	$(need_python_gpu)
	@$(PYTHON_GPU) scripts/set_up.py .venv-gpu requirements-gpu.txt --minimum 3.12 --llama-cpp --project

legacy-env: ## .venv-legacy: the pinned legacy pipeline, for the same machine
	$(need_python_gpu)
	@$(PYTHON_GPU) scripts/set_up.py .venv-legacy requirements-legacy.txt --minimum 3.12 --project

gpu-bundle: setup ## one archive, and the base smollm2 in pieces, for a GPU machine without a network (gpu-bundle/)
	$(PY) scripts/gpu_bundle.py

clean: ## delete environments, bundle and caches of this checkout (not ~/.cache/forge, not runs/)
	rm -rf .venv .venv-gpu .venv-legacy gpu-bundle build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
