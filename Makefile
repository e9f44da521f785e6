# make demo | test | lint | bench | notebooks | clean. Needs only Python >= 3.10 with pip; .venv is made on demand.
#   PYTHON=python3.12     which Python makes .venv
#   ARGS="-k metrics"     passed on by test and demo
#   PIP_ARGS="..."        passed on to pip, e.g. an --extra-index-url with CPU-only builds of torch
PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
NEEDS := setup.py requirements.txt

.DELETE_ON_ERROR:
.PHONY: help demo test lint bench notebooks clean
help:
	@sed -n '1,4s/^# *//p' Makefile

demo: $(VENV)/base.stamp
	$(BIN)/deepcluster demo --out runs/demo --overwrite $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp $(VENV)/bench.stamp
	$(BIN)/python scripts/bench.py all $(ARGS)

notebooks: $(VENV)/notebooks.stamp
	$(BIN)/python scripts/notebooks.py --render $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Debian's python3 may lack ensurepip (package python3-venv): then pip itself puts pip into the new environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "deepcluster needs Python >= 3.10; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) > /dev/null 2>&1 || { \
		rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip install --quiet \
		--target "$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; }

# One stamp per set of extras, so that pip runs only when setup.py or requirements.txt change.
$(VENV)/%.stamp: $(NEEDS) | $(BIN)/python
	@echo "Installing deepcluster ($*) into $(VENV): the first time this takes a minute or two, mostly PyTorch ..."
	@$(PIP) --editable "$(if $(filter base,$*),.,.[$*])"
	@touch $@
