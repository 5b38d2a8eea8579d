// Softmax whose weights are stored in e4m3, and whose logits have a scale for every row and step.
#pragma once

#include "softmax.h"

namespace pixeldiff::attention {

// The largest weight is 2^8 = 256, so that those down to 2^-14 of it are normal numbers of e4m3.
// It has no room to grow: 448 is the largest number, and 0.8 all the slack there would be. The
// maximum is brought up to date in every step, which costs nothing here (sm90_e4m3.h), and the
// weights are rounded relative to the same maximum as the definition rounds them to.
constexpr float kLog2Weight = 8.0f;
// In units of log 2. Below this a weight of 256 is off by 5e-6 of it at most, a hundredth of a
// percent of what e4m3 keeps; beyond, differences are taken first.
constexpr float kNearE4m3 = 256.0f;

template <int kKeys>
struct SoftmaxE4m3 {
  static constexpr int kLogits = kKeys / 2;  // of a thread, both rows together

  float most[2];   // the largest logit so far, in units of log 2
  float total[2];  // of this thread's weights, before they are rounded

  PIXELDIFF_DEVICE void reset() {
    most[0] = most[1] = kLowest;
    total[0] = total[1] = 0.0f;
  }

  // Replaces what was multiplied by weights 2^(s * scale - most + 8); `factor` is what each row's
  // earlier weights are to be multiplied by. A scale is positive, infinite or NaN.
  template <class M>
  PIXELDIFF_DEVICE void weigh(M& m, float (&s)[kLogits], const float (&scale)[2],
                              float (&factor)[2]) {
    float here[2], base[2];
    bool near[2];
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      here[half] = row_maximum(m, s, half);
      const float top = m.multiply(here[half], scale[half]);
      const float now = m.max(most[half], top);
      factor[half] = m.exp2(most[half] - now);
      total[half] *= factor[half];
      most[half] = now;
      near[half] = fabsf(now) <= kNearE4m3;
      base[half] = near[half] ? kLog2Weight - now : top - now + kLog2Weight;
    }
    if (m.any(!near[0] || !near[1])) {
      // A step's own maximum first: the largest weight is then 256 exactly, however large the
      // logit. Nothing is taken off other rows: they do not depend on this one.
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) here[half] = near[half] ? 0.0f : here[half];
      PIXELDIFF_UNROLL
      for (int i = 0; i < kLogits; ++i) s[i] -= here[hopper::accumulator_half(i)];
    }
    PIXELDIFF_UNROLL
    for (int i = 0; i < kLogits; ++i) {
      const int half = hopper::accumulator_half(i);
      const float x = fmaf(s[i], scale[half], base[half]);
      s[i] = by_polynomial(i) ? exp2_polynomial(x) : m.exp2(x);
      total[half] += s[i];
    }
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
