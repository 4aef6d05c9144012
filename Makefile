# Everything here works on a fresh clone: the virtual environment in .venv is made, and the package
# installed into it, when something asks for it and again when the build or the sources in csrc change.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
JOBS ?= 2# processes of pytest, each with as many threads as there are cores
SANITIZERS := address undefined thread
CPP := csrc tests/cpp tests/cuda_emulation

# What an installation is made of. Python sources are used where they lie.
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)

.NOTPARALLEL:
.PHONY: help demo test nightly mutants coverage bench gpu wheel docs lint format sanitize clean
.PRECIOUS: .venv/.installed-%

help:
	@echo "make demo [DATA=DIR] [OUT=DIR]  train, segment and explain on a small data set"
	@echo "make test [JOBS=2]              the whole test suite, in so many processes"
	@echo "make nightly                    the tests that draw their arguments, 10,000 times each"
	@echo "make mutants                    plants faults in the kernels and shows that the tests see them"
	@echo "make coverage                   lines and branches of factorizer_kernels that the tests run"
	@echo "make bench [SIZE=paper]         the benchmarks, and their page in docs/benchmarks"
	@echo "make bench OLD=REVISION [NEW=.] two revisions of the project, side by side"
	@echo "make gpu                        tests, training and benchmarks on a card, 8 minutes, one report"
	@echo "make wheel                      the wheels of this platform, checked and tried, in dist"
	@echo "make docs                       the documentation's site, in build/site"
	@echo "make lint | format              check, or rewrite, the sources' style"
	@echo "make sanitize                   the C++ tests under $(SANITIZERS) sanitizers"
	@echo "make clean                      remove what was built, and .venv"

demo: .venv/.installed-seg
	$(BIN)/factorizer demo $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)")

test: .venv/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

nightly: .venv/.installed-test
	$(BIN)/python -m pytest --hypothesis-profile=nightly -k "fuzz or any_call" $(ARGS)

mutants: .venv/.installed-test
	$(BIN)/python -m pytest tests/mutants -m slow -s $(ARGS)

coverage: .venv/.installed-test
	$(BIN)/python -m pytest tests/factorizer_kernels --cov --cov-report=term-missing --cov-fail-under=95 $(ARGS)

bench: .venv/.installed-bench
ifdef OLD
	$(BIN)/python -m benchmarks.revisions $(OLD) $(NEW) $(ARGS)
else
	mkdir -p build
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=build/benchmarks.json \
	  $(if $(SIZE),--size $(SIZE)) $(ARGS)
	$(BIN)/python -m benchmarks.report build/benchmarks.json
endif

gpu: .venv/.installed-bench
	$(BIN)/python -m benchmarks.gpu $(ARGS)

wheel: .venv/.installed-wheel
	$(BIN)/python packaging/wheels.py $(ARGS)

docs: .venv/.installed-docs
	$(BIN)/mkdocs build --strict --quiet

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find $(wildcard $(CPP)) -type f -not -name '*.py' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*)
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find $(wildcard $(CPP)) -type f -not -name '*.py' | xargs $(BIN)/clang-format -i

sanitize: $(SANITIZERS:%=sanitize-%)
sanitize-%: .venv/.installed-build
	$(BIN)/cmake -S . -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
	  -DCMAKE_BUILD_TYPE=Debug -DFACTORIZER_KERNELS_TESTS=ON -DFACTORIZER_KERNELS_SANITIZE=$*
	$(BIN)/cmake --build build/$*
	$(BIN)/ctest --test-dir build/$* --output-on-failure --no-tests=error

clean:
	rm -rf .venv build dist *.egg-info factorizer_kernels/_native*.so

# Asked before there is a .venv, which would keep a Python that is too old.
CHECK_PYTHON = import sys; sys.version_info >= (3, 10) or sys.exit("PYTHON: $(PYTHON) is Python %d.%d; \
  it must be 3.10 or later, as in make PYTHON=python3.12" % sys.version_info[:2])

# The build requirements stand in .venv, so that a build folder is kept and only what changed is
# compiled again.
.venv/.installed-build: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(PYTHON) -c '$(CHECK_PYTHON)' && $(PYTHON) -m venv .venv; }
	$(PIP) setuptools pybind11 cmake ninja
	touch $@

# The tests run what this machine can run: the kernels of older processors too, and what needs nvcc and no card.
DEVELOPS := .venv/.installed-test .venv/.installed-dev .venv/.installed-bench
$(DEVELOPS): export FACTORIZER_KERNELS_ISAS ?= baseline;native
$(DEVELOPS): export FACTORIZER_KERNELS_CUDA ?= $(if $(shell command -v nvcc),1)
.venv/.installed-%: .venv/.installed-build $(SOURCES)
	@echo "Installing factorizer-kernels[$*] into .venv: some minutes the first time ..."
	$(PIP) --no-build-isolation -e '.[$*]'
	@$(BIN)/python -c "import factorizer_kernels as fk; [print(*b) for b in fk.backends()]"
	touch $@
