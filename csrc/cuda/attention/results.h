// From accumulators to o and the log-sum-exp, in global memory.
#pragma once

#include "../hopper/fragment.h"
#include "schedule.h"

namespace pixeldiff::attention {

struct Results {
  int d;       // channels of a head
  void* o;     // (B, L, G, d) contiguous, 16-bit
  float* lse;  // (B, L, G) contiguous, or nullptr
};

// What a lane holds of one row of queries, `half` of its accumulator. `sum` is of the row's
// weights, relative to `most`, which is not scaled.
template <bool kBf16, class M, int n>
PIXELDIFF_DEVICE void store_row(M& m, const Results& to, const Schedule& schedule,
                                const Schedule::Tile& at, int row, int half, const float (&o)[n],
                                float sum, float most, float scale) {
  if (row >= schedule.L) return;
  const int lane = m.thread() % 32;
  const int64_t index = (static_cast<int64_t>(at.b) * schedule.L + row) * schedule.G + at.g;
  // A row without a key weighs nothing.
  const float inverse = sum == 0.0f ? 0.0f : m.reciprocal(sum);
  char* out = static_cast<char*>(to.o) + index * to.d * 2;
  PIXELDIFF_UNROLL
  for (int i = 2 * half; i < n; i += 4) {
    const int column = hopper::accumulator_column(lane, i);
    if (column < to.d)
      m.store(out + 2 * column, m.template pack<kBf16>(o[i] * inverse, o[i + 1] * inverse));
  }
  if (to.lse != nullptr && lane % 4 == 0) {
    constexpr float kLn2 = 0.6931471805599453f;
    m.store(to.lse + index, fmaf(most, scale, m.log2(sum) * kLn2));
  }
}

}  // namespace pixeldiff::attention
