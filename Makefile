# The commands of this project. All that must be there is make, git and Python 3.11 or newer.
#   make demo     fine-tune a chat model on film reviews, before and after, with a picture
#   make test     every test; FAST=1 leaves out those on the real model
# The first of either makes .venv and fetches what it needs; later ones reuse what is there.

VENV := .venv
BIN := $(VENV)/bin
MATERIAL := examples/material.py

# Fetched models and data, and floats made from them. Kept in the checkout, ignored by git.
export LORAKIT_CACHE ?= $(CURDIR)/.cache
# Passed on to pip, e.g. PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu" for the small CPU torch.
PIP_OPTIONS ?=
# Passed on to pytest, e.g. TESTS="tests/training -k gguf".
TESTS ?=
# The first of these that is new enough makes .venv; PYTHON=... names another.
PYTHON ?=

# What `make test` shows of a run: a line per part, and all about a failure.
SHOWN := -q --no-header --disable-warnings --parts

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs docs-serve sweep sweep-foreign peft-suite peft-draws install install-test data clean
.DELETE_ON_ERROR:

BENCHMARKS := $(sort $(subst _,-,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py))))

help:
	@echo "usage: make TARGET"
	@echo
	@echo "  demo         fine-tune a 135M-parameter chat model on 2,000 film reviews and show what it learnt"
	@echo "  test         run all tests; FAST=1: without the real model; TESTS='tests/laws -k dora': pytest arguments"
	@echo "  lint         check format, lint and types"
	@echo "  format       format all files"
	@echo "  docs         fill the generated pages and build the documentation into site/"
	@echo "  docs-serve   the same, then show it on http://127.0.0.1:8000"
	@echo "  sweep        check small models of every architecture; goes on where it stopped; SWEEP_OPTIONS='--only llama'"
	@echo "  sweep-foreign FILES=FOLDER   init --from over a checkout of Axolotl's or LLaMA-Factory's examples"
	@echo "  peft-suite   PEFT's own tests against lorakit.peft; PEFT_TESTS=folder PEFT_OPTIONS='--share 50 --only test_config.py'"
	@echo "  peft-draws   random options of every type, both ways between PEFT and lorakit; DRAWS='2000 0': how many, first seed"
	@echo "  bench-NAME   run a benchmark: $(or $(BENCHMARKS),none yet)"
	@echo "  data         fetch the model and the rows of the demo into .cache"
	@echo "  install      make .venv with lorakit; install-test: with the tools of tests, lint and docs too"
	@echo "  clean        remove .venv, site and tool caches; what was fetched stays in .cache"
	@echo
	@echo "  PIP_OPTIONS='--extra-index-url https://download.pytorch.org/whl/cpu'   the small CPU build of torch"
	@echo "  PYTHON=python3.12                                                      which Python makes .venv"

demo: data
	$(BIN)/lorakit train examples/reviews.yaml --overwrite

# The fast tests on every processor, a thread each; those on the real model after them, one by one.
test: install-test $(if $(FAST),,data)
	@echo "fast tests: passed, skipped and seconds by part"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(SHOWN) -m "not model and not slow" $(TESTS)
	$(if $(FAST),,@echo "tests on the real model, and slow ones")
	$(if $(FAST),,@OMP_NUM_THREADS=1 LORAKIT_REQUIRE_MODEL=1 $(BIN)/python -m pytest -n auto $(SHOWN) -m "model or slow" $(TESTS))

lint: install-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install-test
	$(BIN)/python docs/pages.py
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet --clean
	@echo "site/index.html; to read it: make docs-serve"

docs-serve: docs
	$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory site

data: install
	@$(BIN)/python $(MATERIAL) all

# Every architecture against the laws; results are kept in benchmarks/results/sweep.json. timm and torchvision lie beside the
# environment and not in it: next to a CPU build of torch, the rest of transformers cannot be imported with PyPI's torchvision.
sweep: install-test $(VENV)/vision
	PYTHONPATH=$(VENV)/vision OMP_NUM_THREADS=1 $(BIN)/python tests/sweep/run.py $(SWEEP_OPTIONS)

sweep-foreign: install-test
	$(BIN)/python tests/sweep/foreign.py $(FILES)

$(VENV)/vision: constraints.txt | $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ --upgrade --no-deps $(PIP_OPTIONS) \
		-c constraints.txt timm torchvision || { mkdir -p $@; echo "timm and torchvision cannot be installed here: left out"; }
	@touch $@

# PEFT's own tests: `pip download peft==0.21.2 --no-binary peft --no-deps` has them in the folder tests of its archive.
peft-suite: install-test $(VENV)/suite
	@test -n "$(PEFT_TESTS)" || { echo "PEFT_TESTS=folder names the folder tests of a checkout of PEFT"; exit 2; }
	PYTHONPATH=$(VENV)/suite $(BIN)/python tests/peft_suite/run.py $(PEFT_TESTS) $(PEFT_OPTIONS)

# What PEFT's tests import and lorakit's do not, beside the environment.
$(VENV)/suite: constraints.txt | $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ --upgrade --no-deps parameterized
	@touch $@

DRAWS ?= 2000 0
peft-draws: install-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/reference/draws.py $(DRAWS)

# A benchmark prints its table, writes benchmarks/results/NAME.json and fails where a stated floor is missed.
bench-%: install-test data
	@test -f benchmarks/$(subst -,_,$*).py || { echo "no benchmark \"$*\"; there are: $(or $(BENCHMARKS),none yet)"; exit 2; }
	PYTHONPATH=examples $(BIN)/python benchmarks/$(subst -,_,$*).py $(BENCH_OPTIONS)

# The environment. A stamp is newer than what was installed from, so a second run does nothing.
install: $(VENV)/installed
install-test: $(VENV)/installed-test

$(VENV)/made:
	@python=$$(for name in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
		"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; \
	done); \
	if [ -z "$$python" ]; then \
		echo "lorakit needs Python 3.11 or newer. Found: $$( \
			for name in $(or $(PYTHON),python3 python); do "$$name" --version 2>/dev/null | sed "s|^|$$name is |"; done \
			| paste -sd, -)."; \
		echo "Install one (https://www.python.org/downloads), or name it: make PYTHON=/path/to/python3.12 ..."; exit 1; \
	fi; \
	echo "making $(VENV) with $$python ($$("$$python" --version))"; \
	"$$python" -m venv $(VENV) || { echo "\"$$python -m venv\" failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site src/*.egg-info
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
