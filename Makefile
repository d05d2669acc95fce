# Everything happens in .venv; nothing outside this folder and the download caches is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DATA   ?= digits

.PHONY: help run test coverage lint format docs bench clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed (PYTHON=/path/to/python3.11 make ...)"; exit 1; }
	@test $$(df -Pk . | awk 'NR==2 {print $$4}') -gt 4000000 || \
	  { echo "Too little space here: 4 GB are needed for the environment"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' || \
	  { echo "Installing failed. Is a package index reachable? (pip's own message is above)"; exit 1; }
	@touch $@

run: $(STAMP)  ## Tune with one server and four devices here (DATA=digits | fashion-mnist)
	@$(BIN)/sfprompt-bench run --data $(DATA) $(ARGS)

test: $(STAMP)  ## All tests, a worker for each core
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

coverage: $(STAMP)  ## The same, one after the other, with coverage
	@$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(ARGS)

lint: $(STAMP)  ## Lint, format check, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP)  ## Write the generated parts of docs/: settings, pictures, the README's figure
	@$(BIN)/python -m tools.settings_page
	@$(BIN)/python -m tools.attacks_table
	@$(BIN)/python -m tools.pictures_page
	@$(BIN)/python -m tools.traffic_figure

bench: $(STAMP)  ## Traffic and accuracy from the paper's form to the default, in minutes
	@$(BIN)/sfprompt-bench traffic --quick $(ARGS)

clean:  ## Remove the environment and everything that was made
	rm -rf $(VENV) *.egg-info build dist .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
