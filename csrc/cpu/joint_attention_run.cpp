// Entry point of joint_attention: splits the work items over the threads and cuts their scratch.
#include <cstdint>
#include <memory>

#include "joint_attention.h"
#include "parallel.h"
#include "variant.h"

namespace pixeldiff::cpu {
namespace {

constexpr double kGrainFlops = 2e6;  // below this a second thread costs more than it saves
constexpr int64_t kAlign = 16;       // floats: one cache line

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Floats of each part, all multiples of a cache line.
struct Parts {
  int64_t q, o, row_state, k, v, logits, row;

  explicit Parts(int64_t d) {
    const int64_t padded = round_up(d, kAttentionRows);
    q = round_up(kAttentionQueries * d, kAlign);
    o = kAttentionQueries * padded;
    row_state = kAttentionQueries;
    k = round_up(kAttentionKeys * d, kAlign);
    v = kAttentionKeys * padded;
    logits = kAttentionKeys * kAttentionTile;
    row = round_up(padded, kAlign);
  }
  int64_t total() const { return q + o + 3 * row_state + k + v + logits + row; }
  AttentionScratch cut(float* p) const {
    AttentionScratch s;
    s.q = p;
    s.o = s.q + q;
    s.max = s.o + o;
    s.sum = s.max + row_state;
    s.missing = s.sum + row_state;
    s.k = s.missing + row_state;
    s.v = s.k + k;
    s.logits = s.v + v;
    s.row = s.logits + logits;
    return s;
  }
};

using ItemsFunction = void (*)(const JointAttentionArgs&, int64_t, int64_t,
                               const AttentionScratch&);

struct Job {
  const JointAttentionArgs* args;
  ItemsFunction items;
  Parts parts;
  float* scratch;
};

}  // namespace

void joint_attention(const JointAttentionArgs& args, Isa isa, int threads) {
  const int64_t per_head = (args.L + kAttentionQueries - 1) / kAttentionQueries;
  const int64_t count = args.B * args.G * per_head;
  const double flops = 4.0 * (double)args.L / per_head * args.S * args.d;  // of one item
  const int64_t grain = (int64_t)(kGrainFlops / flops) + 1;
  const int workers = worker_count(count, grain, threads);

  const Parts parts(args.d);
  const std::unique_ptr<float[]> memory(new float[parts.total() * workers + kAlign]);
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  float* aligned = memory.get() + (64 - address % 64) % 64 / sizeof(float);

  const ItemsFunction items = isa == Isa::avx512_bf16
                                  ? &PIXELDIFF_AVX512_BF16(joint_attention_items)
                                  : PIXELDIFF_VARIANT(isa, joint_attention_items);
  const Job job{&args, items, parts, aligned};
  parallel_for(
      count, workers,
      [](const void* context, int64_t begin, int64_t end, int worker) {
        const auto& job = *static_cast<const Job*>(context);
        job.items(*job.args, begin, end, job.parts.cut(job.scratch + worker * job.parts.total()));
      },
      &job);
}

}  // namespace pixeldiff::cpu
