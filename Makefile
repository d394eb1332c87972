# The two commands to know: `make demo` and `make test`. Each sets up what it needs.
.DEFAULT_GOAL := help
.PHONY: help demo pirate test check soak fuzz clean

# PyTorch's CPU wheel and the pinned tools are made for 3.11; any later Python runs the demo.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN_TESTS := $(BIN)/python -m pytest
# Two workers share two cores, so no library starts threads of its own; and XLA shall compile tiny
# models fast, not make them fast: it halves the time of the tests. What does not depend on the
# backend runs once, where there is nothing to compile.
QUICK := OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 \
	TF_CPP_MIN_LOG_LEVEL=3 XLA_FLAGS=--xla_backend_optimization_level=0
ON_BOTH_CORES := -n 2 --durations=25

help:
	@echo "make demo    load a small real model and ask it something"
	@echo "make pirate  teach it to talk like a pirate: some minutes on a CPU"
	@echo "make test    all checks and tests, on JAX, PyTorch and TensorFlow"
	@echo "make check   format, lint, types, import direction, docstring examples"
	@echo "make soak    the long acceptance runs"
	@echo "make fuzz    45,000 broken and hostile files: each loads, or is refused in one line"
	@echo "make clean   remove what the others made"

# The demo needs little; tests need everything. Each keeps a stamp, so that a second run starts at once.
KERNELS := CMakeLists.txt $(wildcard puna/backend/kernels/src/*)
$(VENV)/.demo: pyproject.toml $(KERNELS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[jax]'
	touch $@

$(VENV)/.dev: pyproject.toml $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	KERAS_BACKEND=$${KERAS_BACKEND:-jax} $(BIN)/python examples/demo.py "$$($(BIN)/python -m tests.assets smollm2)"

$(VENV)/.pirate: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet matplotlib
	touch $@

pirate: $(VENV)/.pirate
	KERAS_BACKEND=$${KERAS_BACKEND:-jax} $(BIN)/python examples/pirate/pirate.py "$$($(BIN)/python -m tests.assets smollm2)" .cache/pirate

test: check
	$(BIN)/python -m tests.assets
	$(QUICK) KERAS_BACKEND=torch $(RUN_TESTS) -m "not soak" $(ON_BOTH_CORES)
	$(QUICK) KERAS_BACKEND=jax $(RUN_TESTS) -m "not soak and not backend_free" $(ON_BOTH_CORES)
	$(QUICK) KERAS_BACKEND=tensorflow $(RUN_TESTS) -m "not soak and not backend_free" $(ON_BOTH_CORES)

check: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/pyright
	$(RUN_TESTS) tests/meta

soak: $(VENV)/.dev
	$(BIN)/python -m tests.assets
	KERAS_BACKEND=jax $(RUN_TESTS) -m soak

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz

clean:
	rm -rf $(VENV) .cache build dist *.egg-info puna/backend/kernels/*.native
