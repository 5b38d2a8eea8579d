// Entry points of the CPU kernels: pick the variant, split the rows, hand each worker its scratch.
#include <memory>

#include "gated_norm_residual.h"
#include "gated_residual_norm.h"
#include "parallel.h"
#include "qk_norm_rope.h"
#include "rms_norm_modulate.h"
#include "sigma_gate.h"
#include "swiglu.h"
#include "variant.h"

namespace pixeldiff::cpu {
namespace {

constexpr int64_t kGrainBytes = 64 * 1024;  // below this a second thread costs more than it saves
constexpr int64_t kScratchAlign = 16;       // floats: no two workers write to one cache line

template <class Args>
using RowsFunction = void (*)(const Args&, int64_t, int64_t, float*);

template <class Args>
struct Job {
  const Args* args;
  RowsFunction<Args> rows;
  float* scratch;
  int64_t scratch_per_worker;
};

// `count` rows of `width` values.
template <class Args>
void run_rows(const Args& args, int64_t count, int64_t width, RowsFunction<Args> rows,
              int64_t scratch_floats, int threads) {
  if (count == 0 || width == 0) return;
  const int64_t row_bytes = width * (args.dtype == DType::f32 ? 4 : 2);
  const int64_t grain = kGrainBytes / row_bytes + 1;
  const int workers = worker_count(count, grain, threads);
  const int64_t per_worker = (scratch_floats + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
  const std::unique_ptr<float[]> scratch(new float[per_worker * workers]);
  const Job<Args> job{&args, rows, scratch.get(), per_worker};
  parallel_for(
      count, workers,
      [](const void* context, int64_t begin, int64_t end, int worker) {
        const auto& job = *static_cast<const Job<Args>*>(context);
        job.rows(*job.args, begin, end, job.scratch + worker * job.scratch_per_worker);
      },
      &job);
}

}  // namespace

void rms_norm_modulate(const RmsNormModulateArgs& args, Isa isa, int threads) {
  run_rows(args, args.B * args.N, args.D, PIXELDIFF_VARIANT(isa, rms_norm_modulate_rows),
           3 * args.D, threads);
}

void gated_norm_residual(const GatedNormResidualArgs& args, Isa isa, int threads) {
  run_rows(args, args.B * args.N, args.D, PIXELDIFF_VARIANT(isa, gated_norm_residual_rows),
           2 * args.D, threads);
}

void gated_residual_norm(const GatedResidualNormArgs& args, Isa isa, int threads) {
  run_rows(args, args.B * args.N, args.D, PIXELDIFF_VARIANT(isa, gated_residual_norm_rows),
           4 * args.D, threads);
}

void qk_norm_rope(const QkNormRopeArgs& args, Isa isa, int threads) {
  run_rows(args, args.B * (args.text.rows + args.image.rows), 3 * args.G * args.d,
           PIXELDIFF_VARIANT(isa, qk_norm_rope_rows), 10 * args.d, threads);
}

void sigma_gate_per_token(const SigmaGatePerTokenArgs& args, Isa isa, int threads) {
  run_rows(args, args.B * args.N, args.D, PIXELDIFF_VARIANT(isa, sigma_gate_per_token_rows), args.D,
           threads);
}

void sigma_gate_per_channel(const SigmaGatePerChannelArgs& args, Isa isa, int threads) {
  run_rows(args, args.B * args.N, args.D, PIXELDIFF_VARIANT(isa, sigma_gate_per_channel_rows), 0,
           threads);
}

void swiglu(const SwigluArgs& args, Isa isa, int threads) {
  run_rows(args, args.B * args.N, args.D, PIXELDIFF_VARIANT(isa, swiglu_rows), 0, threads);
}

}  // namespace pixeldiff::cpu
