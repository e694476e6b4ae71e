# `make demo` and `make test` do all their own set-up. `make help` lists the targets.
#
# VENV=            use the environment that PYTHON belongs to, as it is, offline: nothing is
#                  installed, only the extension is built, in place
# PYTHON=python3   the interpreter, or the one that the virtual environment is made with
# TORCH=...        what pip installs first, and then keeps. A build for CPUs is enough: where pip's
#                  index has a larger one, name an index of such builds in PIP_INDEX_URL
# ARGS=            options of study-msn: --quick, --cifar10 FOLDER, --lr 0.1 and others (--help);
#                  of gpu: --seconds 900, --resume FOLDER, --prebuilt; of test-torch: what pytest
#                  runs instead of its choice, as in ARGS=tests
# WORKERS=2        the processes that tests run in, side by side; 0 is none but pytest's own
#
# FASTSN_TESTS=long in the environment runs all cases of the tests of many combinations.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2

BUILD_TOOLS := 'setuptools>=77' wheel ninja pybind11
SOURCES := $(shell find csrc -mindepth 1)
BENCHMARKS := benchmarks/bench_weights.py benchmarks/bench_training.py
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES) $(wildcard tests/emulator/* tests/emulator/*/*))
# Fails where torch's insides are no more what they were, or what is built upon them.
TORCH_TESTS := $(foreach test,integration/torch_internals* integration/compile \
    integration/composition integration/export integration/trainers weights/autocast \
    weights/copies weights/drop_in weights/functional weights/hook weights/parametrization \
    weights/recompute model/accelerate checkpoints/checkpoints sharded/ddp sharded/fsdp \
    sharded/tensor_parallel, \
    tests/$(dir $(test))test_$(notdir $(test)).py)
# Who has nothing left takes over from the others.
SIDE_BY_SIDE := -n $(WORKERS) --dist worksteal
TORCH_VENV := build/venv-$(subst torch==,,$(TORCH))
BUILT := build/.built
CONFIG := build/.config

ifeq ($(VENV),)
PY := $(PYTHON)
INSTALLED := $(shell $(PY) -c 'import sys, importlib.metadata as m; print(sys.executable, m.version("torch"))' 2>/dev/null)
else
PY := $(VENV)/bin/python
TOOLS := $(VENV)/.tools
endif

.DELETE_ON_ERROR:
.PHONY: help demo test test-torch lint format bench bench-msn bench-quick study-msn gpu build clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(BUILT) ## train small GANs on digits with torch's and fastsn's spectral norm (demo-results/)
	$(PY) -m benchmarks.demo

test: lint ## lint, then all tests
	$(PY) -m pytest $(SIDE_BY_SIDE)

test-torch: ## tests with another torch, in an environment of its own (TORCH=torch==2.14.1)
	$(MAKE) build VENV=$(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(or $(ARGS),$(TORCH_TESTS))

lint: $(BUILT) ## ruff, clang-format and mypy; changes nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(BUILT) ## let ruff and clang-format rewrite the sources
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(CLANG_FORMAT) -i $(CXX_FILES)

bench: $(BUILT) ## benchmarks of spectral norm: table, CSV files and chart (benchmarks/results/)
	$(PY) -m pytest $(BENCHMARKS) --benchmark-quiet --benchmark-json=build/bench.json
	$(PY) -m benchmarks.report build/bench.json

bench-msn: $(BUILT) ## the same of networks with MSN, batch norm or neither
	$(PY) -m pytest benchmarks/bench_msn.py --benchmark-quiet --benchmark-json=build/bench-msn.json
	$(PY) -m benchmarks.report build/bench-msn.json

bench-quick: $(BUILT) ## both on tiny networks, as a proof that they run (build/bench-quick/)
	$(PY) -m pytest benchmarks --quick --benchmark-quiet --benchmark-json=build/bench-quick.json
	$(PY) -m benchmarks.report build/bench-quick.json --out build/bench-quick

study-msn: $(BUILT) ## train small classifiers with MSN, batch norm, SN and neither (benchmarks/results/)
	$(PY) -m benchmarks.msn_study $(ARGS)

# Of the interpreter PYTHON alone, in the environment that it belongs to: as with VENV=.
gpu: ## build, GPU tests, compute-sanitizer and GPU benchmarks; needs a GPU (OUT=folder)
	$(PYTHON) -m benchmarks.gpu_session $(if $(OUT),--out '$(OUT)') $(ARGS)

build: $(BUILT) ## only the set-up: environment and compiled package

clean: ## remove what was built, not the virtual environment
	rm -rf build dist demo-results fastsn.egg-info fastsn/_C*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

# The package of clang-format has no __main__.
CLANG_FORMAT = $(PY) -c 'import sys, clang_format as c; sys.exit(c.clang_format())'

# Changes when what is built against, or how, is not what it was at the last call.
$(CONFIG): FORCE
	@mkdir -p build
	@echo '$(PY) $(INSTALLED) $(TORCH) $(CXX) $(FASTSN_CUDA) $(FASTSN_WERROR)' > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(TOOLS): $(CONFIG)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install '$(TORCH)'
	$(PY) -m pip install $(BUILD_TOOLS)
	$(PY) -m pip freeze | grep '^torch==' > $(VENV)/constraints.txt
	touch $@

# `setup.py --version` says what will be built, or in one line why nothing can be.
define INSTALL
	$(PY) setup.py --version
	$(PY) -m pip install --no-build-isolation -c $(VENV)/constraints.txt -e '.[test,companions,demo,dev]'
endef
# ninja knows what is up to date, and setuptools, which knows less, is not to answer for it.
BUILD_IN_PLACE = $(PY) setup.py build_ext --inplace --force

# pip compiles all of the package, each time: not when only csrc has changed.
$(BUILT): setup.py pyproject.toml $(CONFIG) $(TOOLS) $(SOURCES)
	$(if $(and $(VENV),$(filter-out csrc/%,$?)),$(INSTALL),$(BUILD_IN_PLACE))
	touch $@
