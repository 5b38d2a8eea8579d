# make demo and make test set everything up in .venv by themselves; the second run starts at once.

PYTHON ?= python3
VENV := .venv
PROMPT ?= a red circle on a blue striped background
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
REQUIREMENTS := $(VENV)/.requirements
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The build's tools are those of the virtual environment.
IN_VENV := PATH="$(abspath $(BIN)):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz bench lint format ext sanitize train-demo clean distclean

help:
	@echo "make demo [IMAGE=file]  decode a picture 4x and write the result and a comparison;"
	@echo "     [PROMPT=words]     then draw what PROMPT says"
	@echo "make test [ARGS=...]    run the test suite; ARGS goes to pytest"
	@echo "make fuzz [ARGS=...]    damage files for the readers, 5 minutes each; ARGS as of python -m tests.fuzz"
	@echo "make lint | format      check | rewrite the layout of the sources"
	@echo "make bench [ARGS=...]   measure this machine: some ops and the demo decode; see bench/README.md"
	@echo "make ext                rebuild the compiled kernels in place, only what changed"
	@echo "make sanitize           kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make train-demo         train the demo models again"
	@echo "make clean | distclean  remove build outputs | and .venv"

$(REQUIREMENTS): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("pixeldiff needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

$(INSTALLED): $(REQUIREMENTS) $(NATIVE)
	$(IN_VENV) $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'from pixeldiff import native; print("compiled kernels:", native.why_not() or native.build_info())'
	@touch $@

setup: $(INSTALLED)

demo: setup
	$(BIN)/python -m pixeldiff.demo $(if $(IMAGE),--image "$(IMAGE)")
	$(BIN)/pixeldiff generate "$(PROMPT)" --model demo --seed 0 -o out/generated.png

# A thread each: processes that share the cores spend their time waiting for each other's threads.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=default PIXELDIFF_CLI_EXAMPLES=1000 \
	    $(BIN)/python -m pytest --timeout 1200 tests/fuzz/test_fuzz_cli.py

# With ARGS, any command of it: make bench ARGS="kernels --op swiglu".
bench: setup
ifdef ARGS
	$(BIN)/python -m bench $(ARGS)
else
	@mkdir -p bench/results
	$(BIN)/python -m bench kernels --limit 180 --json bench/results/kernels-here.json
	$(BIN)/python -m bench decode --json bench/results/decode-here.json
	$(BIN)/python -m bench summary bench/results/kernels-here.json bench/results/decode-here.json
endif

lint: $(REQUIREMENTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(REQUIREMENTS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

ext: setup
	$(IN_VENV) $(BIN)/python setup.py build_ext --inplace

sanitize: setup
	@rm -f $(INSTALLED)  # the next target builds the normal extension again
	$(IN_VENV) PIXELDIFF_SANITIZE=address,undefined PIXELDIFF_BUILD_CUDA=0 PIXELDIFF_REQUIRE_EXT=1 \
	    $(BIN)/python setup.py build_ext --inplace --build-temp build/sanitize
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0 \
	    $(BIN)/python -m pytest --capture=sys tests/kernels/test_rms_norm_modulate.py \
	    tests/kernels/test_gated_residual_norm.py tests/kernels/test_gated_norm_residual.py \
	    tests/kernels/test_joint_attention.py \
	    tests/kernels/test_qk_norm_rope.py tests/kernels/test_swiglu.py \
	    tests/kernels/test_sigma_gate.py tests/kernels/test_sigma_gate_norm.py \
	    tests/kernels/test_pixel_embed.py \
	    tests/kernels/test_pixel_adaln_compress.py tests/kernels/test_pixel_adaln_mlp.py \
	    tests/kernels/test_pixel_head.py tests/kernels/test_pixel_head_step.py \
	    tests/kernels/test_local_decoder_down.py tests/kernels/test_local_decoder_up.py \
	    -k "not triton and not compile and not runs_everywhere" $(ARGS)
# CUDA C++ on its emulator; a fiber's stack keeps no freed frames apart. Captured by pytest, a finding
# would be lost: it ends the process.
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 PIXELDIFF_SANITIZE=address,undefined \
	    $(BIN)/python -m pytest --capture=sys tests/kernels/test_local_decoder_up_cuda.py \
	    tests/kernels/test_pixel_adaln_compress_sm90.py tests/kernels/test_pixel_adaln_mlp_sm90.py \
	    -k emulated $(ARGS)

train-demo: setup
	$(BIN)/python -m training demo
	$(BIN)/python -m training l2p-demo

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f pixeldiff/_C*.so pixeldiff/_native_status.json $(INSTALLED)

distclean: clean
	rm -rf $(VENV)
