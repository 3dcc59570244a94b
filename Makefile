# `make demo` and `make test` work on a bare machine: Linux x86-64, Python 3.11 or newer, no GPU.
#
#   make demo      real vLLM servers behind Envoy, with kvlane and round robin: who serves more from cache
#   make test      every test, real engines included
#   make check     format, lint, types, imports
#   make bench     measure, see docs/performance.md
#   make protos    generate gateway/protos/*_pb2.py again
#   make install   the environment alone; the others do it when needed
#   make clean     remove everything that the others made
#
# PYTHON names the interpreter, TORCH_INDEX an index with CPU wheels of torch (deploy/install.py says more).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TORCH_INDEX

.PHONY: install demo test check bench protos clean

install: $(STAMP)

$(STAMP): pyproject.toml deploy/install.py deploy/vllm_cpu/pyproject.toml
	$(PYTHON) -m deploy.install $(VENV)
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m deploy.demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/kvlane bench extproc
	$(BIN)/kvlane bench index

# The result is committed: only a change of a .proto file needs this.
protos: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. gateway/protos/*.proto

clean:
	rm -rf $(VENV) .kvlane *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
