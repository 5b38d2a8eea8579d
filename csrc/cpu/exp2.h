// 2^x of a vector for x <= 0, as softmax needs it. Included once per instruction set (see simd.h).
#pragma once

#include "simd.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// 2^f for f in [0, 1]: minimax in relative error with p(0) = 1, so that the largest logit of a row
// weighs exactly 1. Error of the polynomial 2e-9; evaluated in fp32, at most 1.1 ulp.
inline Vec exp2_fraction(Vec f) {
  Vec p = Vec::fill(0x1.c5417ap-13f);
  p = Vec::fma(p, f, Vec::fill(0x1.46d64cp-10f));
  p = Vec::fma(p, f, Vec::fill(0x1.3d0b92p-7f));
  p = Vec::fma(p, f, Vec::fill(0x1.c68912p-5f));
  p = Vec::fma(p, f, Vec::fill(0x1.ebfd58p-3f));
  p = Vec::fma(p, f, Vec::fill(0x1.62e42cp-1f));
  return Vec::fma(p, f, Vec::fill(1.0f));
}

// 2^x for x <= 0. -inf gives 0, NaN stays NaN. Below the smallest normal number AVX-512 underflows
// gradually, the others return 0.
inline Vec exp2_nonpositive(Vec x) {
#if defined(__AVX512F__)
  // The fraction of -inf is 0 and 2^-inf is 0: no special case.
  const Vec f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return {_mm512_scalef_ps(exp2_fraction(f).v, x.v)};
#elif defined(__AVX2__)
  const __m256 floor = _mm256_floor_ps(x.v);
  const __m256 p = exp2_fraction({_mm256_sub_ps(x.v, floor)}).v;
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(floor), 23);
  const __m256 power =
      _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
  const __m256 tiny = _mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(tiny, _mm256_mul_ps(p, power))};
#else
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  constexpr float kShift = 12582912.0f;
  Vec f;
  uint32_t power[Vec::width];
  for (int i = 0; i < Vec::width; ++i) {
    const float shifted = (x.v[i] - 0.5f) + kShift;
    f.v[i] = x.v[i] - (shifted - kShift);
    power[i] = (to_bits(shifted) << 23) + 0x3f800000;
  }
  const Vec p = exp2_fraction(f);
  Vec r;
  for (int i = 0; i < Vec::width; ++i)
    r.v[i] = x.v[i] < -126.0f ? 0.0f : p.v[i] * from_bits(power[i]);
  return r;
#endif
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
