# make demo   sets up, then prepare -> train -> evaluate -> analyze on a corpus drawn by the project itself (CPU, minutes)
# make test   sets up, then runs the tests
# make lint   ruff
# make gpu-check  on a machine with a GPU: the kernels' tests, their benchmarks at the sizes of the goals, the verdict
#                 (with a Python of your own that has torch, triton, click, pytest: make gpu-check PY=python3 READY=)
# PIP_ARGS is handed to pip, e.g. for the smaller CPU build of torch on a laptop:
#   make demo PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"

PYTHON ?= python3
PIP_ARGS ?=
DEMO ?= demo
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: setup demo test lint gpu-check clean-demo
setup: $(READY)

# Made again only when a requirements file changes.
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
	$(PY) -m pytest -n auto --dist loadfile

lint: $(READY)
	$(PY) -m ruff check .

gpu-check: $(READY)
	$(PY) -m pytest tests/test_margin_triton.py tests/test_gather.py
	$(PY) -m kernels.bench compile --csv kernels/compiled.csv
	$(PY) -m kernels.bench check --csv kernels/gpu-check.csv

clean-demo:
	rm -rf $(DEMO)
