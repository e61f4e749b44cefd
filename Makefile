PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Never install into an interpreter that is not a virtual environment, whatever .venv/bin/python points to.
export PIP_REQUIRE_VIRTUALENV := 1
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo tour test check docs dist lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

demo: $(VENV)/.installed-demo ## train and evaluate on synthetic data
	$(BIN)/perfedrec demo

tour: $(VENV)/.installed-tour ## start a federation of four homes and open the page of one of them
	$(BIN)/perfedrec tour

test: $(VENV)/.installed-test ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

dist: $(VENV)/.installed-dev ## build what other machines install: a wheel, the sources, constraints.txt
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	cp constraints.txt dist

check: $(VENV)/.installed-dev ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.installed-docs ## build the site in build/site, without a network
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -d build/doctrees docs build/site
	@echo "build/site/index.html"

# pip is the last thing that venv writes: a folder left by an interrupted run has none, and is completed.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# pip shows what it downloads where somebody looks; logs get one line.
QUIET := $(if $(shell test -t 2 && echo terminal),,--quiet --quiet)

# A stamp says which set is installed: tour, test and docs hold demo, test holds tour, dev holds all.
extras_docs := [docs]
extras_tour := [flower,web]
extras_test := [test]
extras_dev := [dev]
sets_demo := demo
sets_docs := demo docs
sets_tour := demo tour
sets_test := demo tour test
sets_dev := demo docs tour test dev
size_demo := 1.3 GB
size_docs := 1.5 GB
size_tour := 1.5 GB
size_test := 2.5 GB
size_dev := 2.5 GB

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing perfedrec$(extras_$*) and what it needs into $(VENV): $(size_$*) with torch for processors, several"
	@echo "more where pip takes torch for GPUs. This can take some minutes ..."
	@$(PIP) install $(QUIET) --constraint constraints.txt --editable ".$(extras_$*)"
	@touch $(sets_$*:%=$(VENV)/.installed-%)

# Nothing is installed for it. Names and versions are those of the report that pip writes.
PINS := import json, sys; about = [each["metadata"] for each in json.load(sys.stdin)["install"]]; \
	pins = [each["name"] + "==" + each["version"].split("+")[0] for each in about if each["name"] != "perfedrec"]; \
	left = [each for each in pins if not each.startswith(("nvidia-", "cuda-", "triton="))]; \
	print(*sorted(left, key=lambda each: each.lower().split("==")), sep="\n")

lock: $(BIN)/pip ## resolve the newest admitted versions anew and write constraints.txt
	@set -e; new=$$(mktemp); trap 'rm -f "$$new"' EXIT; \
	$(PIP) install --quiet --quiet --dry-run --ignore-installed --report "$$new" ".[dev]"; \
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -c '$(PINS)' < "$$new"; } > constraints.new; \
	mv constraints.new constraints.txt

clean: ## remove the virtual environment, caches and builds
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
