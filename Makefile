# make quickstart            train a small TerraMind on the embedded world and generate (5 to 15 minutes on 2 cores)
# make quickstart DATA=DIR   the same on your own GeoTIFFs: DIR/MODALITY/NAME.tif
# make test                  lint and the fast tests
# make test-parity           against TerraTorch, in .venv-peer if that is there, else in .venv-parity (made with the `parity` extra)
# make test-full             all tests but those, the slow ones included; with the compiler for TPUs, which needs none, and the page of `serve`,
#                            whose tests skip without a Chromium or Chrome on the PATH

PYTHON ?= python3
VENV ?= .venv
OUT ?=
LULC_CODES ?= terramesh
BIN := $(VENV)/bin
PARITY := $(if $(wildcard .venv-peer/bin/python),.venv-peer,.venv-parity)

# XLA allocates its buffers anew at every step; huge pages keep a CPU from faulting each of them in by 4 KiB.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: quickstart test test-parity test-full golden lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-tpu: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[test,tpu,beam,page]"
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

quickstart: $(VENV)/.installed
	$(BIN)/terramind-jax quickstart $(if $(OUT),--out=$(OUT)) $(if $(DATA),--data=$(DATA) --lulc_codes=$(LULC_CODES))

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 --durations=10

.venv-parity/.installed: setup.py
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet -e ".[parity,test]"
	@touch $@

test-parity: $(if $(filter .venv-parity,$(PARITY)),.venv-parity/.installed)
	OMP_NUM_THREADS=1 $(PARITY)/bin/python -m pytest tests/parity tests/test_convert.py -n 2 --dist loadfile --max-worker-restart=0 -m "" --durations=10

golden:
	$(PARITY)/bin/python tests/parity/make_golden.py

test-full: lint $(VENV)/.installed-tpu
	$(BIN)/python -m pytest -m "" --durations=20

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .cache
