// What the local decoder's kernels multiply and what they make of the sums: 16 pixels by 16
// channels, two products of m16n8k16 in bf16.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::local_decoder {

constexpr int kOut = 16;    // channels of the result
constexpr int kBlock = 16;  // values that one product sums over
constexpr int kFragmentBytes = kBlock * kOut * 2;

// Where element (k, channel) of a matrix lies among the 16-bit elements of a fragment: for each
// lane four words, B of two products of m16n8k16. Columns 2q and 2q + 1 of the first product are
// channels 4q and 4q + 1, of the second 4q + 2 and 4q + 3: a lane's accumulators of a pixel are
// four channels side by side.
PIXELDIFF_HOST_DEVICE constexpr int fragment_at(int k, int channel) {
  const int column = channel / 4 * 2 + channel % 2, lane = column * 4 + k % 8 / 2;
  return (lane * 4 + channel / 2 % 2 * 2 + k / 8) * 2 + k % 2;
}
// The other way round: of a lane's word, the channel and the first of its two k.
PIXELDIFF_HOST_DEVICE constexpr int fragment_channel(int lane, int word) {
  return lane / 8 * 4 + word / 2 * 2 + lane / 4 % 2;
}
PIXELDIFF_HOST_DEVICE constexpr int fragment_k(int lane, int word) {
  return word % 2 * 8 + lane % 4 * 2;
}
// The channel of accumulator i, of 8, is 4 (lane % 4) + this; its pixel's half is i / 2 % 2.
PIXELDIFF_HOST_DEVICE constexpr int accumulator_channel(int i) { return i / 4 * 2 + i % 2; }

template <class M>
PIXELDIFF_DEVICE void add(M& m, float (&to)[8], const uint32_t (&values)[4],
                          const uint32_t (&weights)[4]) {
  m.template multiply<true>(&to[0], values, weights[0], weights[1]);
  m.template multiply<true>(&to[4], values, weights[2], weights[3]);
}

// The same of 8 channels.
template <class M>
PIXELDIFF_DEVICE void add(M& m, float (&to)[4], const uint32_t (&values)[4],
                          const uint32_t (&weights)[2]) {
  m.template multiply<true>(to, values, weights[0], weights[1]);
}

template <class M>
PIXELDIFF_DEVICE float silu(M& m, float x) {
  constexpr float kLog2e = 1.4426950408889634f;
  return x * m.reciprocal(1.0f + m.exp2(-kLog2e * x));
}
// The four channels of a lane's pixel in one half of a product's rows.
template <class M>
PIXELDIFF_DEVICE void activate(M& m, const float (&from)[8], int half, uint32_t (&to)[2]) {
  PIXELDIFF_UNROLL
  for (int n = 0; n < 2; ++n) {
    const int i = 4 * n + 2 * half;
    to[n] = m.template pack<true>(silu(m, from[i]), silu(m, from[i + 1]));
  }
}

}  // namespace pixeldiff::local_decoder
