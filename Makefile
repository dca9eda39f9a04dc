# make train   set up $(VENV), compile the kernels, train the smallest preset on the embedded text, fill a mask, draw the curves
# make test    set up $(VENV) with the development tools, compile the kernels and run the tests
# make lint    ruff, mypy and clang-format, changing nothing      make format   the same, mending what they can
# make VENV=path/to/env ... uses that environment; a torch that is already importable there is kept.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/embbert.yaml
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := runs/$(basename $(notdir $(CONFIG)))
CXX_SOURCES = find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh'

.PHONY: train test lint format

train: $(VENV)/.installed $(VENV)/.kernels
	$(BIN)/ultrazoo train $(CONFIG) --resume auto
	$(BIN)/ultrazoo fill-mask $(RUN) "The king of [MASK]"
	$(BIN)/ultrazoo plot $(RUN)

test: $(VENV)/.dev $(VENV)/.kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CXX_SOURCES) | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_SOURCES) | xargs -r $(BIN)/clang-format -i

# A system-wide torch (a container image, say) is taken over by the new environment.
$(BIN)/python:
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)

$(VENV)/.torch: torch.txt | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install -r torch.txt
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(wildcard setup.py)
	$(PIP) install -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(wildcard setup.py)
	$(PIP) install -e '.[dev]'
	touch $(VENV)/.installed $@

# Compiled once per user, with a line of progress; without a compiler the references run, and the line says so.
$(VENV)/.kernels: $(VENV)/.installed $(shell $(CXX_SOURCES))
	$(BIN)/ultrazoo doctor --build > $@.log
	touch $@

# make bench   parity, then pytest-benchmark over the ops' realistic samples; ARGS="-k retention" picks some
.PHONY: bench
bench: $(VENV)/.dev
	$(BIN)/python -m pytest bench $(ARGS)

# make sanitize      the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over all samples
# make fuzz-ops      10,000 raw calls of the ops, a third valid, a third with one wrong argument, a third random
# make test-cuda     every CUDA kernel run on the CPU, thread by thread (plain, under AddressSanitizer, under ThreadSanitizer),
#                    compiled for every architecture, and the faults planted in the kernels that this catches
# make cuda-matrix   nvcc: registers, spills, shared memory, occupancy, modelled times; ARGS=--quick: two architectures
# make gpu-check     on a GPU: parity and benchmarks, written to bench/results/gpu-NAME.md
.PHONY: sanitize fuzz-ops test-cuda cuda-matrix gpu-check
sanitize: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/sanitize.py

fuzz-ops: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_ops.py $(ARGS)

$(VENV)/.cuda: bench/cuda_tools.txt | $(VENV)/.dev
	$(PIP) install -q -r bench/cuda_tools.txt
	touch $@

test-cuda: $(VENV)/.cuda cuda-matrix
	$(BIN)/python bench/cuda_old.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/simt/check.py --order all
	OMP_NUM_THREADS=1 $(BIN)/python tests/simt/check.py --define UZ_SIMT_MMA --dtype bfloat16 --dtype float16 retention bitlinear
	OMP_NUM_THREADS=1 $(BIN)/python tests/simt/check.py --mode address
	OMP_NUM_THREADS=1 $(BIN)/python tests/simt/check.py --mode thread --dtype float32
	OMP_NUM_THREADS=1 $(BIN)/python tests/simt/mutations.py

cuda-matrix: $(VENV)/.dev
	$(BIN)/python bench/cuda_matrix.py $(ARGS)

gpu-check: $(VENV)/.dev
	$(BIN)/python bench/gpu_check.py $(ARGS)

# make faults        every fault that a training run must survive, really brought about; ARGS="--only 1a,5" picks some
.PHONY: faults
faults: $(VENV)/.dev
	cd tests && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m faults --jobs $(JOBS) $(ARGS)

# make test-plugins  install the plugins of plugins/, built from copies, into a folder of their own, and run their tests
.PHONY: test-plugins
test-plugins: $(VENV)/.dev
	rm -rf $(VENV)/plugins && mkdir -p $(VENV)/plugins && cp -r plugins $(VENV)/plugins/sources
	$(PIP) install -q --no-deps --target $(VENV)/plugins/site $(VENV)/plugins/sources/*/
	set -e; for plugin in $(abspath $(VENV))/plugins/sources/*/; do cd $$plugin; OMP_NUM_THREADS=1 \
	  PYTHONPATH=$(abspath $(VENV))/plugins/site $(abspath $(BIN))/python -m pytest -q -n $(JOBS) -p no:cacheprovider; done

# make planted-plugin  five faults in the kernel of a scaffolded plugin, without the samples that show them: which checks fail
.PHONY: planted-plugin
planted-plugin: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/planted_plugin.py
