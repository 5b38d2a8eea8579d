// GELU in its exact form, x * Phi(x), Phi the normal distribution function.
//
// log2 Phi(-t) is smooth, so that Phi(-t) = 2^polynomial(t) needs no cases: about 25 instructions
// where erf takes two branches. Against fp64: relative error below 3e-7 for x > -1, absolute error
// below 1e-7 * max(|x|, 1e-1) everywhere, and exactly 0 from x = -8 down, where fp32 erf has long
// been -1. NaN stays NaN, +inf stays +inf, -inf gives NaN, as the product with 0 does in PyTorch.
#pragma once

#include "simd_math.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

constexpr float kGeluCut = 8.0f;  // Phi(-8) = 6e-16

// (log2 Phi(-t) + 1) / t on [0, 8], least worst-case error of t * Phi(-t); highest power first.
constexpr float kLogPhi[] = {1.930923199e-09f,  -7.975438621e-08f, 1.427564484e-06f,
                             -1.446705301e-05f, 8.935012738e-05f,  -3.085393691e-04f,
                             3.820396887e-05f,  6.919231731e-03f,  -5.243206769e-02f,
                             -4.592215717e-01f, -1.151104331e+00f};
// (2^f - 1) / f on [-1/2, 1/2], highest power first.
constexpr float kExp2[] = {1.535335759e-04f, 1.339887618e-03f, 9.618437849e-03f,
                           5.550332367e-02f, 2.402264774e-01f, 6.931471825e-01f};

template <int N>
static inline Vec polynomial(const float (&coefficients)[N], Vec t) {
  Vec sum = Vec::fill(coefficients[0]);
  for (int i = 1; i < N; ++i) sum = Vec::fma(sum, t, Vec::fill(coefficients[i]));
  return sum;
}

// 2^a for -126 < a < 128
static inline Vec exp2_normal(Vec a) {
  const Vec magic = Vec::fill(0x1.8p23f);  // adding it rounds to an integer
  const Vec shifted = a + magic;
  const Vec f = a - (shifted - magic);
  return add_exponent(Vec::fma(polynomial(kExp2, f), f, Vec::fill(1.0f)), shifted);
}

static inline Vec gelu(Vec x) {
  const Vec zero = Vec::zero(), one = Vec::fill(1.0f), cut = Vec::fill(kGeluCut);
  const Vec magnitude = absolute(x);
  const Vec t = where_less(magnitude, cut, magnitude, cut);
  Vec below = exp2_normal(Vec::fma(polynomial(kLogPhi, t), t, Vec::fill(-1.0f)));
  below = where_less(t, cut, below, zero);
  return x * where_less(x, zero, below, one - below);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
