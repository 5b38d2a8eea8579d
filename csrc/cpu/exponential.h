// Exponential and sigmoid of a vector of floats. Included once per instruction set (see simd.h).
#pragma once

#include "simd_math.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

#if defined(__AVX512F__)

// NaN passes through: the processor's min and max return their second operand for one.
inline Vec clamp(Vec a, float low, float high) {
  const __m512 raised = _mm512_max_ps(_mm512_set1_ps(low), a.v);
  return {_mm512_min_ps(_mm512_set1_ps(high), raised)};
}
// a * 2^n for an integral n, into the subnormal numbers and to infinity.
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

#elif defined(__AVX2__)

inline Vec clamp(Vec a, float low, float high) {
  const __m256 raised = _mm256_max_ps(_mm256_set1_ps(low), a.v);
  return {_mm256_min_ps(_mm256_set1_ps(high), raised)};
}
// In two halves: 2^n itself may be no normal number. |n| <= 252.
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high))};
}

#else

inline Vec clamp(Vec a, float low, float high) {
  Vec r;
  for (int i = 0; i < Vec::width; ++i) {
    const float raised = a.v[i] < low ? low : a.v[i];
    r.v[i] = raised > high ? high : raised;
  }
  return r;
}
inline Vec scale_by_power(Vec a, Vec n) {
  Vec r;
  for (int i = 0; i < Vec::width; ++i) {
    // Adding 1.5 * 2^23 leaves n in the low bits; of a NaN they are arbitrary and harmless.
    const uint32_t whole = to_bits(n.v[i] + 0x1.8p23f) - to_bits(0x1.8p23f);
    const uint32_t half = (whole >> 1) | (whole & 0x80000000u);
    r.v[i] = a.v[i] * from_bits((half + 127) << 23) * from_bits((whole - half + 127) << 23);
  }
  return r;
}

#endif

// e^x, relative error below 1.1 ulp where the result is normal; 0 below -104, infinity above 88.8,
// NaN of NaN.
inline Vec exp(Vec x) {
  x = clamp(x, -104.0f, 89.0f);
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to the nearest integer.
  const Vec magic = Vec::fill(0x1.8p23f);
  const Vec n = Vec::fma(x, Vec::fill(0x1.715476p+0f), magic) + Vec::fill(-0x1.8p23f);
  // ln 2 in two parts, the first of 9 bits, so that n times it is exact without a fused multiply.
  Vec r = Vec::fma(n, Vec::fill(-0x1.63p-1f), x);
  r = Vec::fma(n, Vec::fill(0x1.bd0106p-13f), r);
  // e^r = 1 + r + r^2 q(r), minimax on |r| <= ln(2)/2: 0.05 * 2^-24.
  Vec q = Vec::fma(Vec::fill(0x1.6a2434p-10f), r, Vec::fill(0x1.1239e2p-7f));
  q = Vec::fma(q, r, Vec::fill(0x1.5558f2p-5f));
  q = Vec::fma(q, r, Vec::fill(0x1.555492p-3f));
  q = Vec::fma(q, r, Vec::fill(0x1.fffffcp-2f));
  return scale_by_power(Vec::fma(r * r, q, r) + Vec::fill(1.0f), n);
}

inline Vec one_plus_exp_of_minus(Vec x) { return exp(x * Vec::fill(-1.0f)) + Vec::fill(1.0f); }

// 1 / (1 + e^-x); exactly 0 below -88.8 and 1 above 17.
inline Vec sigmoid(Vec x) { return divide(Vec::fill(1.0f), one_plus_exp_of_minus(x)); }

// x / (1 + e^-x): one division. NaN of minus infinity, as PyTorch's.
inline Vec silu(Vec x) { return divide(x, one_plus_exp_of_minus(x)); }

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
