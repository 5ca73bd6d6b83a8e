# make demo | make test | make install | make lock | make export | make clean-nbs | make readme
# Everything lives in .venv; the first call installs (a few GB and minutes, mostly PyTorch), later calls start at once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test install lock export clean-nbs readme
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): settings.ini setup.py pyproject.toml requirements.lock | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c requirements.lock -e '.[dev]'
	touch $@

install: $(STAMP)

# The newest versions that fit together, for every platform and Python. `UV_CONSTRAINT=FILE make lock` keeps within limits.
lock: $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --no-annotate \
		--custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

demo: install
	$(BIN)/rvos demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests $(PYTEST_ARGS)

export: install
	$(BIN)/nbdev_export

clean-nbs: install
	$(BIN)/nbdev_clean

readme: install
	$(BIN)/python .ci/readme
