// Entry points of the pixel stream's CPU kernels: pick the variant, split the patches or image
// rows. The kernels need no scratch.
#include "parallel.h"
#include "pixel_adaln_compress.h"
#include "pixel_adaln_mlp.h"
#include "pixel_embed.h"
#include "pixel_head.h"
#include "pixel_head_step.h"
#include "variant.h"

namespace pixeldiff::cpu {
namespace {

constexpr int64_t kGrainPixels = 2048;  // below this a second thread costs more than it saves

template <class Args>
struct Job {
  const Args* args;
  void (*range)(const Args&, int64_t, int64_t);
};

// `count` ranges of `pixels` pixels each.
template <class Args>
void run(const Args& args, void (*range)(const Args&, int64_t, int64_t), int64_t count,
         int64_t pixels, int threads) {
  if (count == 0 || pixels == 0) return;
  const int64_t grain = kGrainPixels / pixels + 1;
  const Job<Args> job{&args, range};
  parallel_for(
      count, worker_count(count, grain, threads),
      [](const void* context, int64_t begin, int64_t end, int) {
        const auto& job = *static_cast<const Job<Args>*>(context);
        job.range(*job.args, begin, end);
      },
      &job);
}

}  // namespace

void pixel_embed(const PixelEmbedArgs& a, Isa isa, int threads) {
  run(a, PIXELDIFF_VARIANT(isa, pixel_embed_rows), a.B * a.H, a.W, threads);
}

void pixel_adaln_compress(const PixelAdalnCompressArgs& a, Isa isa, int threads) {
  run(a, PIXELDIFF_VARIANT(isa, pixel_adaln_compress_patches), a.group.R, a.group.J, threads);
}

void pixel_adaln_mlp(const PixelAdalnMlpArgs& a, Isa isa, int threads) {
  run(a, PIXELDIFF_VARIANT(isa, pixel_adaln_mlp_patches), a.group.R, a.group.J, threads);
}

void pixel_head(const PixelHeadArgs& a, Isa isa, int threads) {
  run(a, PIXELDIFF_VARIANT(isa, pixel_head_patches), a.R, a.patch * a.patch, threads);
}

void pixel_head_step(const PixelHeadStepArgs& a, Isa isa, int threads) {
  run(a, PIXELDIFF_VARIANT(isa, pixel_head_step_patches), a.head.R, a.head.patch * a.head.patch,
      threads);
}

}  // namespace pixeldiff::cpu
