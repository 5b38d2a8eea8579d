// A row of a tile of the projection, from the accumulators to q, k and v: rounded to 16 bits as a
// projection of its own would be, q and k normalised over the head and turned, and rounded again.
//
// Four neighbouring lanes hold a row of a head together. M is the machine: the GPU, or its
// emulator.
#pragma once

#include <cmath>

#include "columns.h"

namespace pixeldiff::qkv {

template <class M, class Columns, bool kBf16>
struct Epilogue {
  static constexpr int kPairs = Columns::kPairs;
  static constexpr int kWords = Columns::kRuns * kPairs;  // pairs of a head's row in a thread

  // The angles of a row for this thread's pairs.
  struct Angles {
    float cos[kWords], sin[kWords];

    PIXELDIFF_DEVICE void load(M& m, const float* cos_row, const float* sin_row, int lane) {
      PIXELDIFF_UNROLL
      for (int run = 0; run < Columns::kRuns; ++run) {
        const int slot = Columns::channel(lane, run) / 2;
        m.template load_floats<kPairs>(cos_row + slot, cos + run * kPairs);
        m.template load_floats<kPairs>(sin_row + slot, sin + run * kPairs);
      }
    }
  };

  // One head's part of a row, as pairs of 16 bits.
  uint32_t words[kWords];

  template <int n>
  PIXELDIFF_DEVICE void round(M& m, const float (&sums)[n], int head, int half) {
    PIXELDIFF_UNROLL
    for (int run = 0; run < Columns::kRuns; ++run) {
      PIXELDIFF_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        const int i = Columns::accumulator(head, run, pair, half);
        words[run * kPairs + pair] = m.template pack<kBf16>(sums[i], sums[i + 1]);
      }
    }
  }

  // All lanes of a warp take part.
  PIXELDIFF_DEVICE void normalise_and_turn(M& m, const char* gains, float eps, const Angles& angles,
                                           int lane) {
    float first = 0.0f, second = 0.0f;  // of a pair: two chains, not one
    PIXELDIFF_UNROLL
    for (int w = 0; w < kWords; ++w) {
      float a, b;
      m.template unpack<kBf16>(words[w], a, b);
      first = fmaf(a, a, first);
      second = fmaf(b, b, second);
    }
    float sum = first + second;
    sum += m.shuffle_xor(sum, 1);
    sum += m.shuffle_xor(sum, 2);
    constexpr float kCount = Columns::kHeadDim;
    constexpr bool kExact = (Columns::kHeadDim & (Columns::kHeadDim - 1)) == 0;
    const float mean = kExact ? sum * (1.0f / kCount) : m.divide(sum, kCount);
    const float inverse = m.inverse_root(mean + eps);
    PIXELDIFF_UNROLL
    for (int run = 0; run < Columns::kRuns; ++run) {
      uint32_t gain[kPairs];
      m.template load_words<kPairs>(gains + 2 * Columns::channel(lane, run), gain);
      PIXELDIFF_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        const int w = run * kPairs + pair;
        float a, b, gain_a, gain_b;
        m.template unpack<kBf16>(words[w], a, b);
        m.template unpack<kBf16>(gain[pair], gain_a, gain_b);
        a = a * inverse * gain_a;
        b = b * inverse * gain_b;
        const float cos = angles.cos[w], sin = angles.sin[w];
        words[w] = m.template pack<kBf16>(fmaf(a, cos, -(b * sin)), fmaf(a, sin, b * cos));
      }
    }
  }

  PIXELDIFF_DEVICE void store(M& m, char* out, int lane) const {
    PIXELDIFF_UNROLL
    for (int run = 0; run < Columns::kRuns; ++run)
      m.template store_words<kPairs>(out + 2 * Columns::channel(lane, run), words + run * kPairs);
  }
};

}  // namespace pixeldiff::qkv
