// 2^x on the FMA units.
//
// The special-function units give 16 exponentials a clock and multiprocessor, the tensor cores at
// head_dim 64 ask for 16; what is computed here they need not.
#pragma once

#include <cmath>
#include <cstring>

#include "../hopper/host_device.h"

namespace pixeldiff::attention {

PIXELDIFF_HOST_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}
PIXELDIFF_HOST_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// For x <= 127, with a relative error of 3e-6 at most. Rounding a weight to bf16 adds 2e-3 and
// degree 3, with 1e-4, would do for that; but the weights are also summed, and the log-sum-exp is
// fp32. 1 at 0 exactly; 0 from -127 down, -inf included. Of a NaN it makes a number: who calls sees
// to that.
//
// x = n + r with r in [-1/2, 1/2]: adding 1.5 * 2^23 leaves n in the low bits of the sum, from
// where it is shifted into the exponent of a polynomial in r, of least relative error with 1 at 0.
// Between -127 and -126 the exponent wraps to that of a subnormal: off, but below 2^-126.
PIXELDIFF_HOST_DEVICE float exp2_polynomial(float x) {
  constexpr float kShift = 12582912.0f;
  x = fmaxf(x, -127.0f);
  const float shifted = x + kShift;
  const float r = x - (shifted - kShift);
  float p = fmaf(0.009582576341927052f, r, 0.05590682849287987f);
  p = fmaf(p, r, 0.24024106562137604f);
  p = fmaf(p, r, 0.6931241154670715f);
  p = fmaf(p, r, 1.0f);
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

}  // namespace pixeldiff::attention
