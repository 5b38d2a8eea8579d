// Which keys of a tile take part: one bit each, the same words in every lane of a warp.
#pragma once

#include <cmath>

#include "../hopper/host_device.h"

namespace pixeldiff::attention {

template <int kKeys>
struct Keep {
  static constexpr int kWords = kKeys / 32;

  uint32_t words[kWords];

  // Keys from `first` on, those past the last and those that the mask leaves out with a 0.
  template <class M>
  PIXELDIFF_DEVICE static Keep of(M& m, const uint8_t* mask, int first, int S) {
    Keep keep;
    const int lane = m.thread() % 32;
    bool bits[kWords];
    PIXELDIFF_UNROLL
    for (int w = 0; w < kWords; ++w) {
      const int key = first + 32 * w + lane;
      bits[w] = key < S && (mask == nullptr || m.load(mask + key) != 0);
    }
    PIXELDIFF_UNROLL
    for (int w = 0; w < kWords; ++w) keep.words[w] = m.ballot(bits[w]);
    return keep;
  }

  // The logits of left-out keys become -inf, whatever they were.
  PIXELDIFF_DEVICE void apply(int lane, float (&s)[kKeys / 2]) const {
    uint32_t all = ~0u;
    PIXELDIFF_UNROLL
    for (int w = 0; w < kWords; ++w) all &= words[w];
    if (all == ~0u) return;
    PIXELDIFF_UNROLL
    for (int i = 0; i < kKeys / 2; ++i) {
      // The lane's share of the column is taken off the word, so that the rest is a constant.
      const int column = i / 4 * 8 + i % 2;
      if (!(words[column / 32] >> (lane % 4 * 2) >> (column % 32) & 1)) s[i] = -INFINITY;
    }
  }
};

}  // namespace pixeldiff::attention
