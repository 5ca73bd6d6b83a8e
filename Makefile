# make demo | make test | make install | make export | make clean-nbs | make readme
# Everything lives in .venv; the first call installs (a few GB and minutes, mostly PyTorch), later calls start at once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test install export clean-nbs readme
.DEFAULT_GOAL := demo

$(STAMP): settings.ini setup.py pyproject.toml .github/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c .github/constraints.txt -e '.[dev]'
	touch $@

install: $(STAMP)

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
