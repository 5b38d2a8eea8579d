#!/usr/bin/env bash
# Builds, tests and measures on a bare CUDA machine, in under nine minutes, with no network.
#
#   bash bench/run_gpu.sh             the tests, the ops and a decode at 2048; results in $OUT, default
#                                     bench/results
#   bash bench/run_gpu.sh --more      instead: torch.compile, the ops at 1024 and 4096, decodes of other
#                                     networks, precisions and sizes
#   bash bench/run_gpu.sh --l2p       instead: a network call of L2P at 1024, 4096, 8192 and 10240, and of the
#                                     latent model it comes from
#   bash bench/run_gpu.sh --cuda      instead: the CUDA C++ kernels alone: their tests, compute-sanitizer on the
#                                     small ones, and a race of each against its Triton version and vendors'
#   bash bench/run_gpu.sh --tune      instead: measures the tiles of the Triton kernels and puts the
#                                     rewritten tables, triton_kernels/*.json, into $OUT/tables too
#   bash bench/run_gpu.sh --dry-run   the stages of the first three on a CPU at tiny sizes, to rehearse them
#
# Races of kernels end in "choose": the tables of backends they give, in $OUT/tables/measured, to be
# looked at and put into pixeldiff/ops/measured.
#
# Every stage has a time limit of its own and a log; a stage that fails or hangs costs its own
# results only, and those it had measured so far are kept. PYTHON chooses the interpreter, BACKEND
# what the decode stages force (default: what each op picks itself).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

DRY=0 TUNE=0 MORE=0 L2P=0 CUDA=0
case "${1:-}" in
  "") ;;
  --dry-run) DRY=1 ;;
  --tune) TUNE=1 ;;
  --more) MORE=1 ;;
  --l2p) L2P=1 ;;
  --cuda) CUDA=1 ;;
  *) echo "usage: bash bench/run_gpu.sh [--more | --l2p | --cuda | --tune | --dry-run]" >&2; exit 2 ;;
esac
# Not installed, only on the path: the package then finds its Triton kernels through a link.
if [ "$DRY" -eq 0 ] && [ ! -e pixeldiff/triton_kernels ]; then
  ln -s ../triton_kernels pixeldiff/triton_kernels
fi
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-bench/results}"
mkdir -p "$OUT" || exit 1
OUT="$(cd "$OUT" && pwd)"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
TOTAL="${TOTAL:-$((DRY ? 1200 : 530))}" # seconds for everything; a rehearsal may be on a slow machine
SECONDS=0
SUMMARY=()

# stage NAME SECONDS COMMAND...: runs it under its limit, or what is left of the whole.
stage() {
  local name="$1" limit="$2" left=$((TOTAL - SECONDS)) started=$SECONDS code
  shift 2
  if [ "$left" -lt 10 ]; then
    SUMMARY+=("$(printf '%-16s %6s  skipped: the whole limit of %s s is used up' "$name" - "$TOTAL")")
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name (at most $limit s)"
  # TERM first: the benchmarks then keep their rows and end their workers.
  timeout --signal=TERM --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  local took=$((SECONDS - started)) state=ok
  case $code in
    0) ;;
    124 | 130 | 137 | 143) state="stopped at $limit s (code $code)" ;;
    *) state="failed, code $code" ;;
  esac
  if [ "$code" -ne 0 ] || [ "$name" = environment ]; then tail -n 25 "$OUT/$name.log"; fi
  SUMMARY+=("$(printf '%-16s %4s s  %s' "$name" "$took" "$state")")
  return $code
}

environment() {
  "$PYTHON" - <<'PY'
import importlib.util, platform, shutil, subprocess
print("python", platform.python_version())
for name in ("torch", "triton", "pybind11", "cmake", "ninja", "pytest", "hypothesis", "click",
             "rich", "safetensors", "matplotlib", "pynvml"):
    print(name, "present" if importlib.util.find_spec(name) else "ABSENT")
for tool in ("nvcc", "c++", "cmake", "ninja", "git"):
    print(tool, shutil.which(tool) or "ABSENT")
from bench.machine import commit
print("commit", commit(), "" if commit() != "unknown" else "(no history here: set PIXELDIFF_COMMIT)")
import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "available", torch.cuda.is_available())
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PY
  nvidia-smi 2>/dev/null || echo "no nvidia-smi"
}

build() {
  for module in pybind11 setuptools; do
    "$PYTHON" -c "import $module" 2>/dev/null \
      || { echo "$module is absent: the extension cannot be built; Triton and PyTorch still run"; return 3; }
  done
  command -v cmake >/dev/null || "$PYTHON" -c "import cmake" 2>/dev/null \
    || { echo "cmake is absent: the extension cannot be built"; return 3; }
  command -v ninja >/dev/null || echo "ninja is absent: CMake's own generator builds, slower"
  local arch=auto
  if [ "$DRY" -eq 0 ]; then
    # Only this device's architecture: the others cost a minute each. 9.0 needs its "a" features.
    arch="$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')" \
      || return 3
  fi
  PATH="/usr/local/cuda/bin:$PATH" PIXELDIFF_REQUIRE_EXT=1 \
    PIXELDIFF_BUILD_CUDA="$([ "$DRY" -eq 1 ] && echo 0 || echo auto)" \
    PIXELDIFF_CUDA_ARCHS="${arch/auto/}" CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}" \
    "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m pixeldiff.cli info
}

# sanitize TOOL TESTS...: tests under one of compute-sanitizer's tools, which looks at the kernels of
# csrc/cuda: theirs are the names with the library's namespace.
sanitize() {
  local tool="$1" found
  shift
  found="$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer)" \
    || { echo "compute-sanitizer is absent"; return 3; }
  # PyTorch keeps memory that it has freed, in which an access out of bounds would go unnoticed.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$tool" --error-exitcode 9 \
    --kernel-name kns=pixeldiff "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu "$@"
}

# What the functions above are run by: timeout starts programs, not functions.
export -f environment build sanitize
export PYTHON DRY

kernels() { stage "kernels-$1" "$2" "$PYTHON" -m bench kernels --json "$OUT/kernels-$1.json" "${@:3}"; }
decode() { stage "decode-$1" "$2" "$PYTHON" -m bench decode --json "$OUT/decode-$1.json" \
  ${BACKEND:+--backend "$BACKEND"} "${@:3}"; }
forward() { stage "forward-$1" "$2" "$PYTHON" -m bench forward --json "$OUT/forward-$1.json" "${@:3}"; }

stage environment 60 bash -c environment
if [ "$DRY" -eq 1 ]; then
  if [ -n "${DRY_BUILD:-}" ]; then stage build 240 bash -c build; fi
  stage tests 240 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/bench
  kernels short 240 --device cpu --quick --no-compile
  kernels full 240 --device cpu --quick --no-compile --dtype bf16 --limit 40
  kernels cuda-rehearsal 120 --device cpu --quick --no-compile --rivals --dtype bf16 --limit 30 \
    --op joint_attention,qkv_norm_rope,local_decoder_up
  decode short 240 --device cpu --config demo --size 64 --new-size 0 --images 2 --steps 1 --compare reference
  decode full 240 --device cpu --config demo --size 128 --images 2 --steps 1 --compare reference,upstream
  forward tiny 240 --device cpu --config tiny --size 64 --guided --rounds 3 --seconds 5 \
    --compare pixeldiff-no-graphs,reference,source
elif [ "$TUNE" -eq 1 ]; then
  stage build 120 bash -c build
  stage tune 380 "$PYTHON" -m bench tune --seconds 0.4 --sizes 2048,4096 --limit 360 --json "$OUT/tune.json"
  mkdir -p "$OUT/tables" && cp triton_kernels/*.json "$OUT/tables/"
elif [ "$CUDA" -eq 1 ]; then
  stage build 120 bash -c build
  # A race for each kernel, with a file of its own.
  kernels cuda-attention 45 --device cuda --dtype bf16 --op joint_attention --sizes 2048,4096 \
    --seconds 1.5 --limit 35 --no-compile --rivals
  kernels cuda-attention-fp8 30 --device cuda --dtype bf16 --op joint_attention_fp8 --sizes 2048 \
    --seconds 1.5 --limit 20 --no-compile --rivals
  kernels cuda-qkv 30 --device cuda --dtype bf16 --op qkv_norm_rope --sizes 2048,4096 --seconds 1 \
    --limit 20 --no-compile --rivals
  kernels cuda-mlp 30 --device cuda --dtype bf16 --op pixel_adaln_mlp --sizes 2048,4096 --seconds 1 \
    --limit 22 --no-compile
  kernels cuda-compress 28 --device cuda --dtype bf16 --op pixel_adaln_compress --sizes 2048,4096 \
    --seconds 1 --limit 22 --no-compile
  kernels cuda-up 40 --device cuda --dtype bf16 --op local_decoder_up --sizes 4096,8192 --seconds 1 \
    --limit 30
  stage tests-cuda 85 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/kernels \
    -k "(cuda or sm90) and not triton" \
    $("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 6 --dist loadfile")
  for tool in memcheck racecheck synccheck; do
    stage "sanitize-$tool" 40 bash -c 'sanitize "$@"' - "$tool" \
      tests/kernels/test_local_decoder_up_cuda.py tests/kernels/test_pixel_adaln_mlp_sm90.py \
      tests/kernels/test_pixel_adaln_compress_sm90.py tests/kernels/test_qkv_norm_rope_sm90.py \
      tests/kernels/test_joint_attention_fp8.py tests/kernels/test_joint_attention.py \
      -k "cuda and (takes_all or views or matches_oracle) or qkv and on_a_gpu"
  done
elif [ "$MORE" -eq 1 ]; then
  stage build 120 bash -c build
  # Compiling the whole network takes a minute or more: alone, so that it can only lose itself.
  decode compile 140 --device cuda --config flux-2k --size 2048 --new-size 0 --images 7 \
    --compare reference,compile --timeout 120
  kernels full 80 --device cuda --dtype bf16 --sizes 1024,4096 --seconds 1 --limit 65 --no-compile
  decode v1.5 60 --device cuda --config flux-v1.5 --size 2048 --new-size 0 --images 4 \
    --compare reference --timeout 40
  decode fp8 60 --device cuda --config flux-2k --size 2048 --new-size 0 --images 4 --precision fp8 \
    --compare reference --timeout 40
  decode 4096 60 --device cuda --config flux-v1.5 --size 4096 --new-size 0 --images 2 \
    --compare reference --timeout 40
elif [ "$L2P" -eq 1 ]; then
  stage build 120 bash -c build
  # 4096 and 8192 have goals: 120 and 150 ms, and 16 GB, which leave the decoder 1.5.
  forward 4k 60 --device cuda --config 4k --compare pixeldiff-no-graphs,reference --seconds 10 \
    --decoder-memory 1.5
  forward 8k 60 --device cuda --config 8k --compare pixeldiff-no-graphs,reference --seconds 10 \
    --decoder-memory 1.5
  forward 4k-guided 45 --device cuda --config 4k --guided --compare pixeldiff-no-graphs --seconds 8
  forward 1k 40 --device cuda --config 1k --compare pixeldiff-no-graphs,reference --seconds 5
  forward 10k 60 --device cuda --config 10k --compare pixeldiff-no-graphs,reference --seconds 10
  # The source takes seconds a call at 4096: 49 times the work.
  forward source 90 --device cuda --config 4k --compare source --rounds 3 --seconds 5
  # Compiling the whole network takes a minute or more: last, so that it can only lose itself.
  forward compile 170 --device cuda --config 4k --compare reference,compile --seconds 8
else
  stage build 120 bash -c build
  # Most of the time is compilation: on as many processes as the memory of the largest tests allows.
  stage tests-kernels 130 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/kernels \
    $("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 6 --dist loadfile")
  stage tests 90 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests --ignore tests/kernels
  # Short first: if the machine goes away, the most telling rows are there.
  kernels short 115 --device cuda --dtype bf16 --sizes 2048 --seconds 0.5 --limit 100
  decode short 70 --device cuda --config flux-2k --size 2048 --new-size 1024 --images 7 \
    --compare reference,upstream --timeout 45
fi

shopt -s nullglob
races=()
for file in "$OUT"/kernels-*.json; do
  if [ "$file" -nt "$OUT/environment.log" ]; then races+=("$file"); fi # of this run, not of others
done
if [ "$DRY" -eq 0 ] && [ "${#races[@]}" -gt 0 ]; then
  stage choose 30 "$PYTHON" -m bench choose "${races[@]}" --tables "$OUT/tables/measured"
fi
results=("$OUT"/kernels-*.json "$OUT"/decode-*.json "$OUT"/forward-*.json)
echo
if [ "${#results[@]}" -gt 0 ]; then
  "$PYTHON" -m bench summary "${results[@]}" 2>&1 | tee "$OUT/summary.log"
  if "$PYTHON" -c "import matplotlib" 2>/dev/null; then
    stage report 60 "$PYTHON" -m bench report "${results[@]}" -o "$OUT/report"
  fi
else
  echo "no stage measured anything; see the logs"
fi
echo
echo "stages, $SECONDS s in all, logs and results in $OUT:"
printf '  %s\n' "${SUMMARY[@]}"
