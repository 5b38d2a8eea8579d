// Entry points of the local decoder's kernels: pack the weights once, split the strips over the
// threads and cut their scratch.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "local_decoder_down.h"
#include "local_decoder_up.h"
#include "parallel.h"
#include "strips.h"
#include "variant.h"

namespace pixeldiff::cpu {
namespace {

constexpr double kGrainFlops = 2e6;  // below this a second thread costs more than it saves
constexpr int64_t kAlign = 16;       // floats: one cache line, and the widest vector
constexpr int64_t kSpare = 16;       // pixels that may be computed behind the last

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Hands out aligned parts of a block; with no block it only adds them up.
class Cutter {
 public:
  explicit Cutter(float* block = nullptr) : block_(block) {}
  float* take(int64_t floats) {
    float* part = block_ ? block_ + used_ : nullptr;
    used_ += round_up(floats, kAlign);
    return part;
  }
  int64_t used() const { return used_; }

 private:
  float* block_;
  int64_t used_ = 0;
};

// Numbers of a row of pixels; channels may be padded to an even number.
int64_t row_floats(int64_t pixels, int64_t channels) {
  return round_up((pixels + kSpare) * (channels + 1), kAlign);
}
int64_t line_floats(int64_t pixels, int64_t channels) {
  return (pixels + kSpare) * channels + kAlign;
}
int64_t weight_floats(int64_t window, int64_t channels, int64_t outputs) {
  return window * (channels + 1) * round_up(outputs, kAlign);
}

void cut_shared(const LocalDecoderDownArgs& a, Cutter& cut, DownMemory& m) {
  m.bias = cut.take(a.Co + kAlign);
  m.weights = cut.take(weight_floats(9, a.Ci, a.Co));
}
void cut_own(const LocalDecoderDownArgs& a, Cutter& cut, DownMemory& m) {
  const int64_t pixels = std::min(a.W, kDownPixels);
  m.row = row_floats(pixels + 2, a.Ci);
  m.rows = cut.take(4 * m.row);
  for (float*& line : m.line) line = cut.take(line_floats(pixels, a.Co));
}

void cut_shared(const LocalDecoderUpArgs& a, Cutter& cut, UpMemory& m) {
  m.up_bias = cut.take(2 * (a.Cu + 1) + kAlign);
  m.bias = cut.take(a.Co + kAlign);
  m.up_weights = cut.take(weight_floats(8, a.Ci, 2 * (a.Cu + 1)));
  m.u_weights = cut.take(weight_floats(9, a.Cu, a.Co));
  m.s_weights = cut.take(weight_floats(9, a.Cs, a.Co));
}
void cut_own(const LocalDecoderUpArgs& a, Cutter& cut, UpMemory& m) {
  const int64_t pixels = std::min(a.W, kUpPixels);
  m.x_row = row_floats(pixels / 2 + 2, a.Ci);
  m.u_row = row_floats(pixels + 2, a.Cu);
  m.skip_row = row_floats(pixels + 2, a.Cs);
  m.x = cut.take(kUpTogether * 2 * m.x_row);
  m.u = cut.take(kUpTogether * 4 * m.u_row);
  m.skip = cut.take(4 * m.skip_row);
  m.line = cut.take(line_floats(pixels, a.Co));
  m.shared = cut.take(line_floats(pixels, a.Co));
}

template <class Args, class Memory>
struct Job {
  const Args* args;
  void (*strips)(const Args&, int64_t, int64_t, const Memory&);
  Memory shared;
  float* scratch;
  int64_t scratch_per_worker;
};

// `count` pairs of rows of `flops` each.
template <class Args, class Memory>
void run(const Args& args, int64_t count, double flops, int threads,
         void (*prepare)(const Args&, const Memory&),
         void (*strips)(const Args&, int64_t, int64_t, const Memory&)) {
  if (count == 0) return;
  const int workers = worker_count(count, (int64_t)(kGrainFlops / flops) + 1, threads);
  Memory memory{};
  Cutter shared, own;
  cut_shared(args, shared, memory);
  cut_own(args, own, memory);
  const int64_t floats = shared.used() + workers * own.used() + kAlign;
  const std::unique_ptr<float[]> block(new float[floats]());
  const auto address = reinterpret_cast<uintptr_t>(block.get());
  float* aligned = block.get() + (64 - address % 64) % 64 / sizeof(float);

  Cutter cut(aligned);
  cut_shared(args, cut, memory);
  prepare(args, memory);
  const Job<Args, Memory> job{&args, strips, memory, aligned + shared.used(), own.used()};
  parallel_for(
      count, workers,
      [](const void* context, int64_t begin, int64_t end, int worker) {
        const auto& job = *static_cast<const Job<Args, Memory>*>(context);
        Memory memory = job.shared;
        Cutter cut(job.scratch + worker * job.scratch_per_worker);
        cut_own(*job.args, cut, memory);
        job.strips(*job.args, begin, end, memory);
      },
      &job);
}

}  // namespace

#define PIXELDIFF_BF16_VARIANT(isa, name) \
  (isa == Isa::avx512_bf16 ? &PIXELDIFF_AVX512_BF16(name) : PIXELDIFF_VARIANT(isa, name))

void local_decoder_down(const LocalDecoderDownArgs& a, Isa isa, int threads) {
  const int64_t across = strips_of(a.W, kDownPixels).across;
  const double flops = 2.0 * 18 * (double)a.W / across * a.Ci * a.Co;
  run(a, a.B * across * (a.H / 2), flops, threads,
      PIXELDIFF_BF16_VARIANT(isa, local_decoder_down_prepare),
      PIXELDIFF_BF16_VARIANT(isa, local_decoder_down_strips));
}

void local_decoder_up(const LocalDecoderUpArgs& a, Isa isa, int threads) {
  if (a.B == 0) return;
  const int64_t across = strips_of(a.W, kUpPixels).across;
  const int64_t groups = a.S * ((a.B / a.S + kUpTogether - 1) / kUpTogether);
  const double per_pixel = a.Cu * (8.0 * a.Ci + 18.0 * a.Co) + 18.0 * a.Cs * a.Co;
  run(a, groups * across * (a.H / 2), 2.0 * a.W / across * per_pixel, threads,
      PIXELDIFF_BF16_VARIANT(isa, local_decoder_up_prepare),
      PIXELDIFF_BF16_VARIANT(isa, local_decoder_up_strips));
}

}  // namespace pixeldiff::cpu
