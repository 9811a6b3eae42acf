# make demo       all stages on a synthetic corpus (CPU, minutes)
# make test       the tests
# make lint       ruff
# make gpu-check  on a machine with a GPU: tests and benchmarks of the kernels against their goals
#                 (another Python with torch, triton, click, pytest: make gpu-check PY=python3 READY=)
# Each sets up .venv first. PIP_ARGS is passed to pip, e.g. for the smaller CPU build of torch:
#   make demo PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"

PYTHON ?= python3
PIP_ARGS ?=
DEMO ?= demo
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: setup demo test lint gpu-check clean-demo
setup: $(READY)

$(READY): requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "setting up .venv (once; a few minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -r requirements.txt -r requirements-dev.txt
	@touch $@

demo: $(READY)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" scripts/demo.sh $(DEMO)

test: $(READY)
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(PY) -m ruff check .

gpu-check: $(READY)
	$(PY) -m pytest tests/test_margin_triton.py tests/test_gather.py
	$(PY) -m kernels.bench compile --csv kernels/compiled.csv
	$(PY) -m kernels.bench check --csv kernels/gpu-check.csv

clean-demo:
	rm -rf $(DEMO)
