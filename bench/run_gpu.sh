#!/usr/bin/env bash
# Builds, tests and measures on a bare CUDA machine, in under nine minutes, with no network.
#
#   bash bench/run_gpu.sh [--dry-run] [--resume] [PART]
#
#   (no part)    every kernel once, a decode at 2048 and its profile, the ops, the tests of the models;
#                results in $OUT, default bench/results
#   --tests      the tests of the kernels
#   --sanitize   every kernel once under compute-sanitizer's memcheck and racecheck
#   --cuda       the CUDA C++ kernels alone: their tests, compute-sanitizer on the small ones, and a
#                race of each against its Triton version and vendors'
#   --compare    decodes of the network $CONFIG, default flux-2k, at 1024, 2048 and 4096 beside plain
#                PyTorch and the original, and its profile
#   --compile    its decodes at $SIZE, default 2048, beside what torch.compile makes of both, by
#                default and by max-autotune
#   --more       the ops at 1024 and 4096, decodes in fp8 and in tiles, other profiles
#   --l2p        a network call of L2P at 1024, 4096, 8192 and 10240, and of the latent model it
#                comes from
#   --tune       measures the tiles of the Triton kernels and puts the rewritten tables,
#                triton_kernels/*.json, into $OUT/tables too
#
#   --dry-run    the stages of the part on a CPU at tiny sizes, to rehearse it; tests are only
#                collected, and nothing is compiled
#   --resume     leaves out the stages that came to their end before without a failure, by the same
#                command at the same PIXELDIFF_COMMIT
#
# Races of kernels end in "choose": the tables of backends they give, in $OUT/tables/measured, to be
# looked at and put into pixeldiff/ops/measured.
#
# Every stage has a time limit of its own and a log; a stage that fails or hangs costs its own
# results only, and those it had measured so far are kept. PYTHON chooses the interpreter, BACKEND
# what the decode stages force (default: what each op picks itself), ONLY the stages, by their names
# with spaces between. ARCHIVE names a .tar.gz that holds all of $OUT after every stage, and which
# --resume begins with where it exists: for machines that give few files back, or are gone soon.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

DRY=0 RESUME=0 PART=""
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY=1 ;;
    --resume) RESUME=1 ;;
    --tests | --sanitize | --cuda | --compare | --compile | --more | --l2p | --tune)
      [ -z "$PART" ] || { echo "one part at a time, got $PART and $argument" >&2; exit 2; }
      PART="$argument" ;;
    *)
      echo "usage: bash bench/run_gpu.sh [--dry-run] [--resume] [--tests | --sanitize | --cuda |" \
        "--compare | --compile | --more | --l2p | --tune]" >&2
      exit 2 ;;
  esac
done
PYTHON="${PYTHON:-python3}"
# Not installed, only on the path: the package then finds its Triton kernels through a link.
installed() {
  timeout 10 "$PYTHON" -c 'import importlib.metadata as m; m.version("pixeldiff")' >/dev/null 2>&1
}
if [ ! -e pixeldiff/triton_kernels ] && { [ "$DRY" -eq 0 ] || ! installed; }; then
  ln -s ../triton_kernels pixeldiff/triton_kernels
fi
OUT="${OUT:-bench/results}"
mkdir -p "$OUT" || exit 1
OUT="$(cd "$OUT" && pwd)"
if [ "$RESUME" -eq 1 ] && [ -f "${ARCHIVE:-}" ]; then tar -xzf "$ARCHIVE" -C "$OUT"; fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
TOTAL="${TOTAL:-$((DRY ? 1200 : 530))}" # seconds for everything; a rehearsal may be on a slow machine
LEAST="${LEAST:-10}" # seconds without which no stage is begun
SECONDS=0
SUMMARY=()

# stage NAME SECONDS COMMAND...: runs it under its limit, or what is left of the whole.
stage() {
  local name="$1" limit="$2" left=$((TOTAL - SECONDS)) started=$SECONDS code keep=1 what
  shift 2
  what="${PIXELDIFF_COMMIT:-} $*"
  case "$name" in environment | build | choose | report) keep=0 ;; esac # each machine's own
  if [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]]; then return 0; fi
  if [ "$RESUME$keep" = 11 ] && [ "$(cat "$OUT/$name.done" 2>/dev/null)" = "$what" ]; then
    SUMMARY+=("$(printf '%-22s %6s  done before' "$name" -)")
    return 0
  fi
  if [ "$left" -lt "$LEAST" ]; then
    SUMMARY+=("$(printf '%-22s %6s  skipped: the whole limit of %s s is used up' "$name" - "$TOTAL")")
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name (at most $limit s)"
  rm -f "$OUT/$name.done"
  [ "$RESUME" -eq 1 ] || rm -f "$OUT/$name.json" # or it would be gone on with
  # TERM first: the benchmarks then keep their rows and end their workers. Tests get INT, and say
  # what had failed by then.
  : >"$OUT/$name.log"
  while true; do
    timeout --signal="${SIGNAL:-TERM}" --kill-after=10 "$((limit - (SECONDS - started)))" "$@" \
      >>"$OUT/$name.log" 2>&1
    code=$?
    # 76: a kernel took the process's device away; the next one leaves that kernel out.
    [ "$code" -eq 76 ] && [ "$((limit - (SECONDS - started)))" -ge "$LEAST" ] || break
  done
  local took=$((SECONDS - started)) state=ok
  case $code in
    0) [ "$keep" -eq 0 ] || echo "$what" >"$OUT/$name.done" ;;
    75 | 76) state="not finished: --resume goes on with it" ;;
    124 | 130 | 137 | 143) state="stopped at $limit s (code $code)" ;;
    *) state="failed, code $code" ;;
  esac
  # Of tests, how many. Where all were skipped nothing is proven, and the next call tries again.
  local told
  told="$(grep -oE '[0-9]+ (failed|passed|skipped|error).* in [0-9.]+s' "$OUT/$name.log" | tail -n 1)"
  if [ "$code" -eq 0 ] && [ -n "$told" ] && [[ "$told" != *passed* ]]; then
    state="nothing ran" && rm -f "$OUT/$name.done"
  fi
  state+="${told:+, $told}"
  if [ "$code" -ne 0 ] || [ "$name" = environment ]; then tail -n 25 "$OUT/$name.log"; fi
  SUMMARY+=("$(printf '%-22s %4s s  %s' "$name" "$took" "$state")")
  pack
  return $code
}

# pack: all of $OUT into $ARCHIVE, whole or not at all.
pack() {
  if [ -n "${ARCHIVE:-}" ]; then
    tar -czf "$ARCHIVE.part" --exclude='*.tar.gz*' -C "$OUT" .
    # 1: something changed meanwhile, as the folder itself does where the archive lies in it.
    [ $? -le 1 ] && mv "$ARCHIVE.part" "$ARCHIVE"
  fi
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
  # CMake and ninja may be there as packages of an environment that nobody has activated.
  PATH="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):/usr/local/cuda/bin:$PATH" \
    PIXELDIFF_REQUIRE_EXT=1 \
    PIXELDIFF_BUILD_CUDA="$([ "$DRY" -eq 1 ] && echo 0 || echo auto)" \
    PIXELDIFF_CUDA_ARCHS="${arch/auto/}" CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}" \
    "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m pixeldiff.cli info
}

# sanitize TOOL FILTER TESTS...: tests under one of compute-sanitizer's tools, which looks at the
# kernels whose names hold FILTER.
sanitize() {
  local tool="$1" filter="$2" found
  shift 2
  found="$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer)" \
    || { echo "compute-sanitizer is absent"; return 3; }
  "$found" --help 2>/dev/null | grep -A 3 -e '--kernel-' # of this version, should it refuse the filter
  # PyTorch keeps memory that it has freed, in which an access out of bounds would go unnoticed.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$tool" --error-exitcode 9 \
    --kernel-name "kns=$filter" "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -m gpu "$@"
}

# What the functions above are run by: timeout starts programs, not functions.
export -f environment build sanitize
export PYTHON DRY

# without OPTIONS ARGUMENTS...: KEPT is ARGUMENTS less these options and what follows each.
without() {
  local drop=" $1 "
  shift
  KEPT=()
  while [ $# -gt 0 ]; do
    if [[ "$drop" == *" $1 "* ]]; then shift 2; else KEPT+=("$1") && shift; fi
  done
}

# option NAME ARGUMENTS...: what follows NAME, or nothing.
option() {
  local name="$1"
  shift
  while [ $# -gt 0 ]; do
    if [ "$1" = "$name" ]; then echo "$2" && return; fi
    shift
  done
}

# uncompiled LIST: of variants with commas between, those that do not compile; at least one.
uncompiled() {
  local kept
  kept="$(tr ',' '\n' <<<"$1" | grep -v compile | paste -sd, -)"
  echo "${kept:-reference}"
}

# One helper for each command: how a part asks for it, and what becomes of it in a rehearsal.
tests() {
  local name="tests-$1" limit="$2"
  shift 2
  if [ "$DRY" -eq 1 ]; then
    stage "$name" 240 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu --collect-only "$@"
  else
    SIGNAL=INT stage "$name" "$limit" "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -m gpu \
      ${HANGS:+--timeout $((limit / 2)) $HANGS} ${XDIST:-} "$@"
  fi
}

sanitized() {
  local name="sanitize-$1-$2" limit="$3" tool="$1"
  shift 3
  if [ "$DRY" -eq 1 ]; then
    stage "$name" 240 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu --collect-only "${@:2}"
  else
    SIGNAL=INT stage "$name" "$limit" bash -c 'sanitize "$@"' - "$tool" "$@"
  fi
}

kernels() {
  local name="kernels-$1" limit="$2"
  shift 2
  if [ "$DRY" -eq 1 ]; then
    without "--device --dtype --sizes --seconds --limit" "$@"
    limit=240
    set -- "${KEPT[@]}" --device cpu --quick --no-compile --dtype bf16 --limit "${DRY_LIMIT:-30}"
  fi
  stage "$name" "$limit" "$PYTHON" -m bench kernels --resume --json "$OUT/$name.json" "$@"
}

decode() {
  local name="decode-$1" limit="$2" tile
  shift 2
  if [ "$DRY" -eq 1 ]; then
    without "--device --config --size --new-size --images --timeout --tile --compare" "$@"
    limit=240 tile="$(option --tile "$@")"
    set -- "${KEPT[@]}" --device cpu --config demo --size 128 --new-size 0 --images 2 --steps 1 \
      --compare "$(uncompiled "$(option --compare "$@")")" ${tile:+--tile 64}
  fi
  stage "$name" "$limit" "$PYTHON" -m bench decode --json "$OUT/$name.json" \
    ${BACKEND:+--backend "$BACKEND"} "$@"
}

forward() {
  local name="forward-$1" limit="$2"
  shift 2
  if [ "$DRY" -eq 1 ]; then
    without "--device --config --rounds --seconds --compare" "$@"
    limit=240
    set -- "${KEPT[@]}" --device cpu --config tiny --size 64 --rounds 3 --seconds 2 \
      --compare "$(uncompiled "$(option --compare "$@")")"
  fi
  stage "$name" "$limit" "$PYTHON" -m bench forward --json "$OUT/$name.json" "$@"
}

profiled() {
  local name="profile-$1" limit="$2" network=(demo --size 128)
  shift 2
  if [ "$DRY" -eq 1 ]; then
    case "$(option --config "$@")" in 1k | 4k | 8k | 10k) network=(tiny) ;; esac
    without "--device --config --size --images" "$@"
    limit=240
    set -- "${KEPT[@]}" --device cpu --config "${network[@]}" --images 3 --quick
  fi
  stage "$name" "$limit" "$PYTHON" -m bench profile --json "$OUT/$name.json" "$@"
}

CONFIG="${CONFIG:-flux-2k}" SIZE="${SIZE:-2048}"
stage environment 60 bash -c environment
# has MODULE: whether tests that really run can use it.
has() { [ "$DRY" -eq 0 ] && "$PYTHON" -c "import $1" 2>/dev/null >&2; }
# Most of a test's time is compilation: on as many processes as the memory of the largest allows.
XDIST="$(has xdist && echo "-n 6 --dist loadfile")"
# A kernel that never ends holds its process inside the driver, where no signal reaches Python: only
# a thread can end it.
HANGS="$(has pytest_timeout && echo "--timeout-method thread")"
if [ "$DRY" -eq 0 ] || [ -n "${DRY_BUILD:-}" ]; then
  stage build 110 bash -c build
fi
case "$PART" in
  "")
    # If the machine goes away, the most telling results are there: that the kernels are right, what
    # an image takes, and where it goes.
    XDIST="${XDIST/loadfile/load}" tests once 50 tests/kernels/test_every_kernel.py
    decode short 85 --device cuda --config flux-2k --size 2048 --new-size 1024 --images 5 \
      --compare reference,upstream --timeout 45
    profiled short 55 --device cuda --config flux-2k --size 2048
    kernels short 100 --device cuda --dtype bf16 --sizes 2048 --seconds 0.5 --limit 85 --no-compile
    tests models 130 tests --ignore tests/kernels
    ;;
  --tests)
    tests attention 110 tests/kernels/test_joint_attention*.py tests/kernels/test_qk*.py
    tests norms 100 tests/kernels/test_rms_norm*.py tests/kernels/test_gated_*.py \
      tests/kernels/test_sigma_*.py
    tests pixels 110 tests/kernels/test_pixel_*.py tests/kernels/test_local_decoder_*.py
    tests others 100 tests/kernels --ignore-glob '*/test_joint_attention*' \
      --ignore-glob '*/test_qk*' --ignore-glob '*/test_rms_norm*' --ignore-glob '*/test_gated_*' \
      --ignore-glob '*/test_sigma_*' --ignore-glob '*/test_pixel_*' \
      --ignore-glob '*/test_local_decoder_*'
    ;;
  --sanitize)
    # Triton's kernels and ours in CUDA C++ are named so; some of PyTorch's own are, too.
    for tool in memcheck racecheck; do
      for dtype in bf16 fp32; do
        sanitized "$tool" "$dtype" 105 _kernel tests/kernels/test_every_kernel.py -k "$dtype"
      done
    done
    ;;
  --cuda)
    # A race for each kernel, with a file of its own.
    kernels cuda-attention 43 --device cuda --dtype bf16 --op joint_attention --sizes 2048,4096 \
      --seconds 1.5 --limit 35 --no-compile --rivals
    kernels cuda-attention-fp8 30 --device cuda --dtype bf16 --op joint_attention_fp8 --sizes 2048 \
      --seconds 1.5 --limit 20 --no-compile --rivals
    kernels cuda-qkv 30 --device cuda --dtype bf16 --op qkv_norm_rope --sizes 2048,4096 --seconds 1 \
      --limit 20 --no-compile --rivals
    kernels cuda-mlp 30 --device cuda --dtype bf16 --op pixel_adaln_mlp --sizes 2048,4096 --seconds 1 \
      --limit 22 --no-compile
    kernels cuda-compress 26 --device cuda --dtype bf16 --op pixel_adaln_compress \
      --sizes 2048,4096 --seconds 1 --limit 22 --no-compile
    kernels cuda-down 22 --device cuda --dtype bf16 --op local_decoder_down --sizes 4096,8192 \
      --seconds 0.5 --limit 15 --no-compile
    kernels cuda-up 30 --device cuda --dtype bf16 --op local_decoder_up --sizes 4096,8192 \
      --seconds 1 --limit 24 --no-compile
    tests cuda 95 tests/kernels -k "(cuda or sm90) and not triton"
    for tool in memcheck racecheck synccheck; do
      sanitized "$tool" cuda 38 pixeldiff \
        tests/kernels/test_local_decoder_down_cuda.py tests/kernels/test_local_decoder_up_cuda.py \
        tests/kernels/test_pixel_adaln_mlp_sm90.py \
        tests/kernels/test_pixel_adaln_compress_sm90.py tests/kernels/test_qkv_norm_rope_sm90.py \
        tests/kernels/test_joint_attention_fp8.py tests/kernels/test_joint_attention.py \
        -k "cuda and (takes_all or views or matches_oracle) or qkv and on_a_gpu"
    done
    ;;
  --compare)
    # A variant is a process, which takes ten seconds to begin.
    decode "$CONFIG-2048" 110 --device cuda --config "$CONFIG" --size 2048 --new-size 1024 \
      --images 5 --compare pixeldiff-no-graphs,reference,upstream --timeout 45
    decode "$CONFIG-1024" 75 --device cuda --config "$CONFIG" --size 1024 --new-size 0 \
      --images 5 --compare pixeldiff-no-graphs,reference,upstream --timeout 30
    decode "$CONFIG-4096" 130 --device cuda --config "$CONFIG" --size 4096 --new-size 0 \
      --images 2 --compare reference,upstream --timeout 60
    profiled "$CONFIG" 55 --device cuda --config "$CONFIG" --size 2048
    # What torch.compile makes of each op: seconds for each of fifty, so that it takes several calls.
    kernels compiled 50 --device cuda --dtype bf16 --sizes 2048 --seconds 0.3 --limit 40
    ;;
  --compile)
    # A network takes a minute and more to compile; those that take turns do so one after the other.
    decode "compile-$CONFIG-$SIZE" 210 --device cuda --config "$CONFIG" --size "$SIZE" \
      --new-size 0 --images 5 --compare reference,compile,upstream+compile --timeout 120
    decode "max-autotune-$CONFIG-$SIZE" 205 --device cuda --config "$CONFIG" --size "$SIZE" \
      --new-size 0 --images 5 --compare compile-max-autotune --timeout 180
    ;;
  --more)
    decode fp8 60 --device cuda --config flux-2k --size 2048 --new-size 0 --images 5 \
      --precision fp8 --compare reference --timeout 40
    profiled fp8 45 --device cuda --config flux-2k --size 2048 --precision fp8
    decode fp8-4096 60 --device cuda --config flux2-v1.5 --size 4096 --new-size 0 --images 2 \
      --precision fp8 --compare reference --timeout 40
    decode fp8-tiles 50 --device cuda --config flux-2k --size 4096 --tile 2048 --new-size 0 \
      --images 2 --precision fp8 --compare reference --timeout 40
    decode tiles 45 --device cuda --config flux-2k --size 4096 --tile 2048 --new-size 0 \
      --images 2 --compare reference --timeout 40
    profiled l2p 50 --device cuda --config 4k
    profiled 4096 45 --device cuda --config flux-2k --size 4096 --images 3
    kernels full 60 --device cuda --dtype bf16 --sizes 1024,4096 --seconds 0.5 --limit 50 \
      --no-compile
    ;;
  --l2p)
    # 4096 and 8192 have goals: 100 and 120 ms, and 16 GB, which leave the decoder 1.5.
    forward 4k 55 --device cuda --config 4k --compare pixeldiff-no-graphs,reference --seconds 10 \
      --decoder-memory 1.5
    forward 8k 55 --device cuda --config 8k --compare pixeldiff-no-graphs,reference --seconds 10 \
      --decoder-memory 1.5
    forward 1k 35 --device cuda --config 1k --compare pixeldiff-no-graphs,reference --seconds 5
    # The source takes seconds a call at 4096: 49 times the work.
    forward source 70 --device cuda --config 4k --compare source --rounds 3 --seconds 5
    forward 4k-guided 40 --device cuda --config 4k --guided --compare pixeldiff-no-graphs --seconds 8
    forward 10k 45 --device cuda --config 10k --compare pixeldiff-no-graphs,reference --seconds 8
    # Compiling the whole network takes a minute or more: last, so that it can only lose itself.
    forward compile 115 --device cuda --config 4k --compare reference,compile --seconds 8
    ;;
  --tune)
    if [ "$DRY" -eq 1 ]; then
      mkdir -p "$OUT/tables"
      TRITON_INTERPRET=1 stage tune 240 "$PYTHON" -m bench tune --device cpu --op add_silu \
        --scale 64 --sizes 2048 --rounds 3 --seconds 0.1 --limit 60 --tables "$OUT/tables" \
        --resume --json "$OUT/tune.json"
    else
      # Hundreds of tiles, a second or more to compile each: two calls.
      stage tune 400 "$PYTHON" -m bench tune --seconds 0.4 --sizes 2048,4096 --limit 380 \
        --resume --json "$OUT/tune.json"
      mkdir -p "$OUT/tables" && cp triton_kernels/*.json "$OUT/tables/"
    fi
    ;;
esac

shopt -s nullglob
races=()
for file in "$OUT"/kernels-*.json; do
  # Of this run, or of the one it goes on with; not of others, nor of other sources.
  done_by="$([ "$RESUME" -eq 0 ] || cat "${file%.json}.done" 2>/dev/null)"
  if [ "$file" -nt "$OUT/environment.log" ] || [[ "$done_by" == "${PIXELDIFF_COMMIT:-} "* ]]; then
    races+=("$file")
  fi
done
if [ "$DRY" -eq 0 ] && [ "${#races[@]}" -gt 0 ]; then
  stage choose 30 "$PYTHON" -m bench choose "${races[@]}" --tables "$OUT/tables/measured"
fi
results=("$OUT"/kernels-*.json "$OUT"/decode-*.json "$OUT"/forward-*.json "$OUT"/profile-*.json)
echo
if [ "${#results[@]}" -gt 0 ]; then
  "$PYTHON" -m bench summary "${results[@]}" 2>&1 | tee "$OUT/summary.log"
  if "$PYTHON" -c "import matplotlib" 2>/dev/null; then
    stage report 60 "$PYTHON" -m bench report "${results[@]}" -o "$OUT/report"
  fi
elif [ ! -e "$OUT/tune.json" ]; then
  echo "no stage measured anything; see the logs"
fi
echo
echo "stages, $SECONDS s in all, logs and results in $OUT:"
printf '  %s\n' "${SUMMARY[@]}"
pack
