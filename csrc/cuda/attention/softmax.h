// Softmax over keys that come in tiles: weights relative to a maximum that follows behind.
//
// A thread holds two rows of a tile, `half` 0 and 1, and a quarter of the columns of each; four
// neighbouring lanes hold a row together. M is the machine: the GPU, or its emulator.
#pragma once

#include "../hopper/fragment.h"
#include "exp2.h"

namespace pixeldiff::attention {

// Finite, so that a row of logits that are all -inf weighs 0.
constexpr float kLowest = -3.4028234663852886e38f;
// The weights may grow to 2^8 before the maximum they are relative to follows and everything that
// was accumulated is multiplied: all of fp32, bf16 and fp16 hold them as well as those below 1.
// What comes out is the same, whatever the weights are relative to.
constexpr float kSlack = 8.0f;
// Beyond this the product of maximum and scale is rounded too coarsely to be subtracted from a
// product that is not; the difference is then taken first.
constexpr float kNear = 4096.0f;

// Of 16 logits of a thread, one of each row is exponentiated on the FMA units. A polynomial takes 9
// instructions where the special-function units take one and 8 clocks: with an eighth, both finish
// before the tensor cores do in 16 bits, and both together in e4m3 (docs/kernels/attention.md);
// with a quarter, issuing would be the wall.
PIXELDIFF_HOST_DEVICE constexpr bool by_polynomial(int i, int of_sixteen = 2) {
  return (of_sixteen > 0 && i % 16 == 1) || (of_sixteen > 1 && i % 16 == 14);
}

// The largest of a row's logits, the same in its four threads; NaN if one is.
template <class M, int kLogits>
PIXELDIFF_DEVICE float row_maximum(M& m, const float (&s)[kLogits], int half) {
  float even = s[2 * half], odd = s[2 * half + 1];
  PIXELDIFF_UNROLL
  for (int i = 4 + 2 * half; i < kLogits; i += 4) {
    even = m.max(even, s[i]);
    odd = m.max(odd, s[i + 1]);
  }
  float top = m.max(even, odd);
  top = m.max(top, m.shuffle_xor(top, 1));
  return m.max(top, m.shuffle_xor(top, 2));
}

// kPolynomials of 16 exponentials, 0 to 2, are computed on the FMA units.
template <int kKeys, int kPolynomials = 2>
struct Softmax {
  static constexpr int kLogits = kKeys / 2;  // of a thread, both rows together

  float most[2];   // what the weights of a row are relative to, not scaled
  float total[2];  // of this thread's weights

  PIXELDIFF_DEVICE void reset() {
    most[0] = most[1] = kLowest;
    total[0] = total[1] = 0.0f;
  }

  // Replaces the logits by weights 2^((logit - most) * scale). Whether the maximum of any row of
  // the warp moved; `factor` is then what each row's earlier weights are to be multiplied by.
  template <class M>
  PIXELDIFF_DEVICE bool weigh(M& m, float (&s)[kLogits], float scale, float (&factor)[2]) {
    float now[2];
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) now[half] = m.max(most[half], row_maximum(m, s, half));

    // Not written as "greater": NaN, and infinity less infinity, must move it too.
    const bool still[2] = {(now[0] - most[0]) * scale <= kSlack,
                           (now[1] - most[1]) * scale <= kSlack};
    const bool moved = m.any(!(still[0] && still[1]));
    if (moved) {
      // A row does not depend on who else is in the warp: those that need not move do not.
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) {
        factor[half] = still[half] ? 1.0f : m.exp2((most[half] - now[half]) * scale);
        total[half] *= factor[half];
        most[half] = still[half] ? most[half] : now[half];
      }
    }

    float base[2] = {most[0] * scale, most[1] * scale};
    const bool near[2] = {fabsf(base[0]) <= kNear, fabsf(base[1]) <= kNear};
    if (m.any(!(near[0] && near[1]))) {
      const float first[2] = {near[0] ? 0.0f : most[0], near[1] ? 0.0f : most[1]};
      PIXELDIFF_UNROLL
      for (int i = 0; i < kLogits; ++i) s[i] -= first[hopper::accumulator_half(i)];
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) base[half] = near[half] ? base[half] : 0.0f;
    }
    PIXELDIFF_UNROLL
    for (int i = 0; i < kLogits; ++i) {
      const int half = hopper::accumulator_half(i);
      const float x = fmaf(s[i], scale, -base[half]);
      s[i] = by_polynomial(i, kPolynomials) ? exp2_polynomial(x) : m.exp2(x);
      total[half] += s[i];
    }
    return moved;
  }

  // The sum of a row's weights, the same in its four threads; NaN for a row with NaN or +inf among
  // its logits, where the polynomial may have made numbers of NaN.
  template <class M>
  PIXELDIFF_DEVICE float sum(M& m, int half) const {
    float all = total[half];
    all += m.shuffle_xor(all, 1);
    all += m.shuffle_xor(all, 2);
    return all + (most[half] - most[half]);
  }
};

}  // namespace pixeldiff::attention
