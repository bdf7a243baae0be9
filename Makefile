# One command each; the virtual environment is made on first use.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: install demo test test-slow test-swift lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install          ## distil the embedded MNIST subset, train students, write a report
	$(BIN)/prism run

test: install          ## the default tests
	$(BIN)/python -m pytest

test-slow: install     ## the long ones
	$(BIN)/python -m pytest -m 'slow and not s3_real'

test-swift: install    ## those that talk to an object store, against OpenStack Swift (needs liberasurecode)
	$(BIN)/python -m pytest -m s3_real --timeout 3600

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
