# make quickstart   a first row of images      make test   the test suite      make help   everything else
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# What quickstart draws, and where to.
PROMPT ?= a red apple
OUT ?= outputs/quickstart
# For example: make test PYTEST_ARGS="-k bench -x"
PYTEST_ARGS ?=

# The versions to install.
CONSTRAINTS ?= constraints.txt

PACKAGING := pyproject.toml setup.cfg $(CONSTRAINTS)

# What a developer needs.
EXTRAS ?= bench,demo,train,dev

# What the web page shows beside images.
RESULTS ?= $(wildcard notebooks/results/*/cases.jsonl notebooks/results/machines/*/cases.jsonl)

.PHONY: help quickstart demo test lowest newest lint format tables notebooks wheel space clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.core ## Install into .venv and compare presets with the baseline on the embedded model.
	$(BIN)/agentsd compare "$(PROMPT)" --guidance 4 --steps 20 --seconds 90 --out "$(OUT)"

demo: $(VENV)/.demo ## Serve a web page that compares speed and images side by side.
	$(BIN)/agentsd demo $(RESULTS:%/cases.jsonl=--results %)

test: $(VENV)/.dev $(VENV)/.browser ## Run the tests (slow and CUDA tests left out; PYTEST_ARGS adds options).
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

lowest: build/constraints-lowest.txt ## Run the tests with the oldest torch and diffusers allowed, in .venv-lowest.
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=$<

newest: build/constraints-newest.txt ## Run the tests with the newest torch and diffusers, and with timm, in .venv-newest.
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=$< EXTRAS=bench,demo,train,dev,timm

lint: $(VENV)/.dev ## Check style, formatting, types and which way imports go.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format the code and fix what ruff can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(VENV)/.dev ## Rewrite the tables of the documents from the recorded results.
	$(BIN)/python -m agentsd.bench.tables docs/benchmarks.md

notebooks: $(VENV)/.dev ## Run the notebooks and keep what they print.
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

wheel: $(VENV)/.dev ## Build the source archive and the wheel into dist/.
	$(BIN)/python -m build --no-isolation

space: wheel ## Build the web page as a Hugging Face Space in dist/space.
	rm -rf dist/space
	mkdir -p dist/space/results
	cp apps/web_demo.py apps/README.md apps/requirements.txt dist/*.whl dist/space
	cp -r $(RESULTS:%/cases.jsonl=%) dist/space/results

clean: ## Remove build outputs and caches (.venv stays).
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find agentsd apps tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below let a second `make` skip what is installed already, until the packaging files change.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "The pinned environment needs Python 3.11 or newer. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and alone, at its pinned version. The packages that follow ask for "any torch" and find it there;
# installed together with them, the newest torch would be taken, with several GB of CUDA packages on Linux, also where
# a CPU build of the pinned version is at hand.
$(VENV)/.torch: $(VENV)/.made $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) torch
	touch $@

# The pinned versions, but of torch and diffusers the lower bounds that pyproject.toml gives to users, and whatever sympy
# and huggingface_hub those want.
build/constraints-lowest.txt: constraints.txt pyproject.toml Makefile
	mkdir -p $(@D)
	grep -vE '^(torch|diffusers|sympy|huggingface_hub)==' constraints.txt > $@
	sed -nE 's/^ *"(torch|diffusers)>=([0-9.]+).*/\1==\2/p' pyproject.toml >> $@

# The pinned versions, but of torch and diffusers, and of what those want, the newest.
build/constraints-newest.txt: constraints.txt Makefile
	mkdir -p $(@D)
	grep -vE '^(torch|diffusers|sympy|huggingface_hub)==' constraints.txt > $@

$(VENV)/.core: $(VENV)/.torch $(PACKAGING)
	$(PIP) install -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(PACKAGING)
	$(PIP) install -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(PACKAGING)
	$(PIP) install -c $(CONSTRAINTS) -e '.[demo]'
	touch $@

# The tests of the web page drive a real browser.
$(VENV)/.browser: $(VENV)/.dev tests/browser.py
	$(BIN)/python tests/browser.py
	touch $@
