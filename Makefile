# setup | demo | reproduce | test | test-all | sanitize | lint | bench | clean. Each works from a fresh clone: it makes .venv, installs what it needs and runs.
#
#   PYTHON=python3.12 make test      another Python (3.10 or later); if it has torch >= 2.10, that torch is used as it is
#   TORCH=torch==2.12.1 make setup   another torch, where the calling Python has none

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= $(if $(filter torch==2.13.0,$(TORCH)),torchvision==0.28.0,torchvision)
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.*,triton)
BUILD_TOOLS := 'setuptools>=77' wheel ninja pybind11

VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled to bytecode when first imported, not all of them now: most never are.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-compile --constraint $(VENV)/constraints.txt
KERNELS := setup.py pyproject.toml sparsify_kernels/_build.py $(wildcard csrc/*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl)
DEMO_DATA ?= data/demo
DEMO_RUN ?= runs/demo
# What two cores render in a minute or two. A clip costs the encoders the same however much is asked about it: ask much.
DEMO_CLIPS ?= --train 2800 --questions 14 16 --eval-questions 8 9

# Tests in as many processes as there are cores, eight at most.
SHARED := --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: setup demo reproduce test test-all sanitize lint bench clean
.DELETE_ON_ERROR:

setup: $(VENV)/.avqa $(VENV)/.test $(VENV)/.bench $(VENV)/.dev

demo: $(VENV)/.avqa
	test -e $(DEMO_DATA)/annotations/avqa-test.json || $(BIN)/sparsify synth $(DEMO_DATA) $(DEMO_CLIPS)
	test -e $(DEMO_RUN)/results.json || $(BIN)/sparsify train $(DEMO_DATA) --preset demo --output $(DEMO_RUN)
	$(BIN)/sparsify eval $(DEMO_RUN) $(DEMO_DATA) --localisation

reproduce: $(VENV)/.avqa
	$(BIN)/python -m benchmarks.reproduce

test: $(VENV)/.avqa $(VENV)/.test
	$(BIN)/python -m pytest $(SHARED) -m "not slow"

test-all: $(VENV)/.avqa $(VENV)/.test
	$(BIN)/python -m pytest $(SHARED)

sanitize: $(VENV)/.avqa $(VENV)/.test
	$(BIN)/python tests/sparsify_kernels/sanitize.py

lint: $(VENV)/.avqa $(VENV)/.test $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

bench: $(VENV)/.avqa $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds -s
	$(BIN)/python -m benchmarks.end_to_end

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
	rm -f sparsify_kernels/*.so sparsify_kernels/_why_pure.txt

# The environment: its own torch, or the calling Python's, which the constraints then keep. Where that Python is a venv
# itself, "system" would be the Python below it: its packages are named in a .pth file.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	rm -rf $(VENV)
	@if $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)' 2>/dev/null; then \
	    echo "using the torch of $(PYTHON)"; \
	    $(PYTHON) -m venv --system-site-packages $(VENV) && \
	    $(PYTHON) -c 'import sys; sys.prefix == sys.base_prefix or print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
	        > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_the_calling_venv.pth && \
	    $(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/constraints.txt && \
	    $(PIP) $(BUILD_TOOLS); \
	else \
	    $(PYTHON) -m venv $(VENV) && \
	    printf '%s\n' '$(TORCH)' '$(TORCHVISION)' '$(TRITON)' > $(VENV)/constraints.txt && \
	    $(PIP) $(BUILD_TOOLS) '$(TORCH)' '$(TRITON)'; \
	fi
	@touch $@

# tinysoundfont declares pyaudio, which does not build without PortAudio; rendering to arrays does not use it.
$(VENV)/.avqa: $(VENV)/.torch $(KERNELS)
	$(PIP) --no-deps tinysoundfont
	$(PIP) --no-build-isolation --editable '.[avqa]'
	@if [ -e sparsify_kernels/_why_pure.txt ]; then echo "no compiled kernels: $$(cat sparsify_kernels/_why_pure.txt)"; fi
	@touch $@

# The package is installed by now: these add what its extras name, and build nothing.
$(VENV)/.test $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/.avqa
	$(PIP) 'sparsify-avqa[$*]'
	@touch $@
