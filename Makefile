# Everything runs in a virtual environment, which the first target that needs it sets up. `make help` lists the targets.

VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell command -v $(p)),$(p))))
BIN := $(VENV)/bin
COMPAT_VERSIONS ?= 0.26.0 0.33.0

# The stamp's name carries a hash of all that decides what is installed: unchanged files mean there is nothing to do.
INSTALLED_FROM := scripts/install.sh scripts/vllm_cpu_metadata.py pyproject.toml $(sort $(wildcard requirements/*.txt))
STAMP := $(VENV)/.installed-$(shell cat $(INSTALLED_FROM) | sha256sum | cut -c1-16)

.DEFAULT_GOAL := help
.PHONY: help venv demo test gpu compat lint clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 10

$(STAMP):
	scripts/install.sh $(VENV) $(PYTHON)
	@rm -f $(VENV)/.installed-*
	@touch $@

venv: $(STAMP)  ## set up the virtual environment (.venv): vLLM 0.32.0 for CPUs, test tools, this package

demo: $(STAMP)  ## hand prompts from one vLLM server to another on this machine and compare the tokens
	$(BIN)/kvsdk demo $(ARGS)

test: $(STAMP)  ## the tests that need no GPU, but for the slow ones (pytest -m slow)
	$(BIN)/python -m pytest -m "not gpu and not slow" $(ARGS)

compat: $(STAMP)  ## the contract tests and the suite against the Python sources of the oldest and the newest vLLM
	scripts/compat.sh $(VENV) $(COMPAT_VERSIONS)

gpu:  ## the tests that need CUDA devices, in the Python that is active (with vLLM and this package installed)
	python -m pytest -m gpu -p no:randomly $(ARGS)

lint: $(STAMP)  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove the virtual environment and what `make compat` fetched
	rm -rf $(VENV) .cache
