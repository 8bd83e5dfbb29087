# Two commands for a newcomer: `make run` and `make test`. Both set up .venv first. Needs Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Where the machine's python3 is a 3.11 under another name, use that.
PYTHON_FOUND := $(shell command -v $(PYTHON) || command -v python3)
FLEET ?= examples/fleet.yaml

.PHONY: run test test-slow lint format stack stack-stop clean

run: $(VENV)/.installed
	$(BIN)/prefixfleet run $(FLEET)

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q

test-slow: $(VENV)/.installed-test
	$(BIN)/pytest -q -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# PostgreSQL, S3, MLflow, a Prefect server and a worker as processes on loopback, below .prefixfleet-stack/.
stack: $(VENV)/.installed-stack
	docker/stack-local.sh start

stack-stop:
	docker/stack-local.sh stop

clean:
	rm -rf $(VENV) .prefixfleet build *.egg-info

$(VENV)/bin/pip:
	$(PYTHON_FOUND) -c 'import sys; sys.exit("PrefixFleet needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON_FOUND) -m venv $(VENV)

# The pins come first and alone: an unpinned torch would bring gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-stack: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[stack]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
