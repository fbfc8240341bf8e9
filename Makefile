# Every target makes what it needs, starting from a fresh clone: `make` alone lists them.
#
#   PYTHON=python3.12 make test     another interpreter for a new .venv
#   BUILD=debug make test           another build of the compiled core (see setup.py)
#   ARGS="-k window" make test      more arguments for pytest, the demo or the benchmarks
#   ARGS="-n 0 --pdb" make test     all tests in one process, for a debugger

PYTHON ?= python3
BUILD ?= release
ARGS ?=
SANITIZE_CC ?= gcc

# Where this is set, each of the hundreds of processes that tests start compiles all sources anew: a third of its start.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
BIN := $(VENV)/bin
# PYTHONSAFEPATH keeps the working directory out of sys.path, so that a build of another mode, named by
# PYTHONPATH, is never shadowed by the release build beside its sources.
RUN := PYTHONSAFEPATH=1 $(BIN)/python
# Most modules of large packages are never imported; those that are get compiled then.
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile
# Each process has servers of its own, and the files are dealt out among them.
PYTEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

CORE := $(shell find fastpath -name '*.pyx' -o -name '*.pxd' -o -name '*.py' 2>/dev/null)
BUILT = build/$(1)/.built
# The release build lies beside its sources, where the editable install finds it; every other one in build/.
LIBRARY = $(if $(filter release,$(1)),,PYTHONPATH="$(CURDIR)/build/$(1)/lib")
REMOVE_LINKS = find fastpath -name '*.c' -type l -delete
REDIS := $(if $(ACCRUAL_REDIS_SERVER),,$(VENV)/redis7/bin/redis-server)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help demo test test-all build bench bench-core check format sanitize coverage docs baskets clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.has-demo $(call BUILT,$(BUILD)) ## stream a member day of grocery baskets through the whole system
	$(call LIBRARY,$(BUILD)) $(BIN)/accrual demo $(ARGS)

test: $(VENV)/.has-test $(call BUILT,$(BUILD)) $(REDIS) ## run the tests on servers that they start themselves
	$(call LIBRARY,$(BUILD)) $(PYTEST) $(ARGS)

test-all: $(VENV)/.has-test $(call BUILT,$(BUILD)) $(REDIS) ## run the tests with the long fault and load runs
	$(call LIBRARY,$(BUILD)) $(PYTEST) -m "" $(ARGS)

build: $(call BUILT,$(BUILD)) ## compile the core; BUILD=release|native|debug|coverage|sanitize|annotate

bench: $(VENV)/.has-bench $(call BUILT,release) ## measure core and worker beside ceiling and peer; ARGS=--quick to try
	$(BIN)/python -m bench $(ARGS)

bench-core: $(VENV)/.has-bench $(call BUILT,release) ## the core under pytest-benchmark, to compare with saved runs
	$(RUN) -m pytest bench --benchmark-only $(ARGS)

# cython-lint runs pycodestyle by its bare name.
check: export PATH := $(CURDIR)/$(BIN):$(PATH)
check: $(VENV)/.has-check $(VENV)/.has-test $(call BUILT,release) ## ruff, mypy, stubtest, cython-lint, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/stubtest fastpath --allowlist tools/stubtest-allowlist.txt --ignore-unused-allowlist
	$(BIN)/cython-lint fastpath
	$(BIN)/lint-imports

format: $(VENV)/.has-check ## rewrite the Python files as `make check` wants them
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

# Python itself is not instrumented, so the sanitizer's library must be loaded before it; PYTHONMALLOC sends its
# allocations through that library too. Leaks are not looked for, because Python keeps its own until it ends.
sanitize: $(VENV)/.has-test $(call BUILT,sanitize) ## run the tests of the core under AddressSanitizer and UBSan
	$(call LIBRARY,sanitize) PYTHONMALLOC=malloc LD_PRELOAD="$$($(SANITIZE_CC) -print-file-name=libasan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(PYTEST) -p no:cacheprovider tests/unit tests/vectors tests/property $(ARGS)

# Cython's plugin finds the lines of a .pyx through the C beside it, and only there.
coverage: $(VENV)/.has-test $(VENV)/.has-coverage $(call BUILT,coverage) $(REDIS) ## which lines the tests reach
	$(BIN)/coverage erase
	ln -sf $(CURDIR)/build/coverage/fastpath/*.c fastpath/
	$(call LIBRARY,coverage) $(RUN) -m coverage run -m pytest $(ARGS); status=$$?; \
	$(BIN)/coverage combine --quiet && $(call LIBRARY,coverage) $(RUN) -m coverage report || status=$$?; \
	$(REMOVE_LINKS); exit $$status

docs: $(VENV)/.installed ## write the parts of docs/ that are made from the program: the table of settings
	PYTHONPATH="$(CURDIR)" $(BIN)/python tools/make_docs.py $(ARGS)

baskets: $(VENV)/.has-baskets $(VENV)/.installed ## make the demo's sample of grocery baskets again
	$(RUN) tools/make_baskets.py $(ARGS)

clean: ## remove everything that the targets made, but for the figures in bench/results
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	rm -rf .benchmarks .coverage .coverage.* demo-data fastpath/*.so
	$(REMOVE_LINKS)
	find accrual fastpath tests tools bench -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	$(PYTHON) tools/prerequisites.py
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --upgrade $$($(BIN)/python tools/requirements.py build)
	touch $@

$(VENV)/.installed: pyproject.toml tools/requirements.py $(VENV)/.made
	$(INSTALL) $$($(BIN)/python tools/requirements.py build project)
	BUILD=none $(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.has-%: pyproject.toml tools/requirements.py $(VENV)/.made
	$(INSTALL) $$($(BIN)/python tools/requirements.py $*)
	touch $@

$(VENV)/redis7/bin/redis-server: tools/fetch_redis.py $(VENV)/.made
	$(BIN)/python tools/fetch_redis.py $(VENV)/redis7

# Cython and the compiler redo only what is older than its sources; a changed setup.py may change any of it.
STALE = $(and $(wildcard $(1)),$(filter setup.py,$?))

build/release/.built: $(VENV)/.installed setup.py $(CORE)
	$(if $(call STALE,$@),rm -rf build/release fastpath/*.so)
	BUILD=release $(BIN)/python setup.py --quiet build_ext --inplace
	mkdir -p $(@D) && touch $@

build/%/.built: $(VENV)/.installed setup.py $(CORE)
	$(if $(call STALE,$@),rm -rf build/$*)
	BUILD=$* $(if $(filter sanitize,$*),CC=$(SANITIZE_CC)) \
	$(BIN)/python setup.py --quiet build_ext --build-lib build/$*/lib --build-temp build/$*/objects
	mkdir -p $(@D)/lib/fastpath && cp fastpath/*.py $(@D)/lib/fastpath/
	touch $@
