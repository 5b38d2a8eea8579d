// Arithmetic on Vec beyond multiply-add. Internal linkage, and in the namespace of the instruction
// set, for the reason given in simd.h.
#pragma once

#include "simd.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

#if defined(__AVX512F__)

static inline Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec square_root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// The larger in every lane; a NaN where either is.
static inline Vec max_or_nan(Vec a, Vec b) {
  const __m512 most = _mm512_max_ps(a.v, b.v);  // b where either is NaN
  return {_mm512_mask_mov_ps(most, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}
static inline Vec absolute(Vec a) { return {_mm512_abs_ps(a.v)}; }
// a < b ? yes : no in every lane; a NaN takes `no`.
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// a * 2^k, k the integer in the low mantissa bits of `shifted`; for results that stay normal.
static inline Vec add_exponent(Vec a, Vec shifted) {
  const __m512i k = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), k))};
}

#elif defined(__AVX2__)

static inline Vec divide(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
static inline Vec max_or_nan(Vec a, Vec b) {
  const __m256 most = _mm256_max_ps(a.v, b.v);
  return {_mm256_blendv_ps(most, a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
static inline Vec absolute(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
static inline Vec add_exponent(Vec a, Vec shifted) {
  const __m256i k = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), k))};
}

#else

static inline Vec divide(Vec a, Vec b) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] /= b.v[i];
  return a;
}
static inline Vec square_root(Vec a) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
static inline Vec max_or_nan(Vec a, Vec b) {
  for (int i = 0; i < Vec::width; ++i)
    a.v[i] = a.v[i] > b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i];
  return a;
}
static inline Vec absolute(Vec a) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] = __builtin_fabsf(a.v[i]);
  return a;
}
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  for (int i = 0; i < Vec::width; ++i) no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
  return no;
}
static inline Vec add_exponent(Vec a, Vec shifted) {
  for (int i = 0; i < Vec::width; ++i)
    a.v[i] = from_bits(to_bits(a.v[i]) + (to_bits(shifted.v[i]) << 23));
  return a;
}

#endif

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
