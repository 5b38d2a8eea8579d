// One vector of floats per instruction set, and loads and stores that convert from fp32, bf16 and
// fp16 storage. The including file is compiled once per instruction set with PIXELDIFF_ISA naming
// the namespace; `Vec` lives inside it so that no two variants share a symbol. For the same reason
// these files use no inline function or template of the standard library: the linker keeps a
// single copy of those and could keep one that the processor at hand cannot run.
//
// Vec::max(a, b) is a > b ? a : b in each lane: b when either is NaN.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pixeldiff::cpu::PIXELDIFF_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec fill(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, to_bf16()); }
  void store(f16* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // The first n < width elements; a masked access touches nothing else.
  static __mmask16 first(int64_t n) { return (__mmask16)((1u << n) - 1); }
  static Vec load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load_first(const bf16* p, int64_t n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static Vec load_first(const f16* p, int64_t n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
  }
  void store_first(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store_first(bf16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  void store_first(f16* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Vec widen_bf16(__m256i halves) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  }
  __m256i to_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_srli_epi32(rounded, 16);
    // Rounding would carry a NaN's payload into infinity.
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
  }
  Vec operator+(Vec b) const { return {_mm512_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm512_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm512_mul_ps(v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
};

#elif defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec fill(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    rounded = _mm256_srli_epi32(rounded, 16);
    // Rounding would carry a NaN's payload into infinity.
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed =
        _mm256_packus_epi32(rounded, rounded);  // low halves of each 128-bit lane
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
  }
  void store(f16* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  Vec operator+(Vec b) const { return {_mm256_add_ps(v, b.v)}; }
  Vec operator-(Vec b) const { return {_mm256_sub_ps(v, b.v)}; }
  Vec operator*(Vec b) const { return {_mm256_mul_ps(v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
};

#else

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float a) { return a; }
inline float widen(bf16 a) { return from_bits((uint32_t)a.bits << 16); }
inline float widen(f16 a) {
  const uint32_t sign = (uint32_t)(a.bits & 0x8000) << 16;
  const uint32_t magnitude = a.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude << 13));  // inf, nan
  // Read as an fp32 of exponent too small by 112, then scale: exact for subnormals as well.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

inline void narrow(float a, float* p) { *p = a; }
inline void narrow(float a, bf16* p) {
  const uint32_t bits = to_bits(a);
  p->bits = a != a ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float a, f16* p) {
  const uint32_t sign = (to_bits(a) >> 16) & 0x8000;
  const uint32_t magnitude = to_bits(a) & 0x7fffffff;
  uint32_t half;
  if (a != a) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Subnormal in fp16: adding 0.5 makes the fp32 adder round to multiples of 2^-24.
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = (uint16_t)(sign | half);
}

struct Vec {
  static constexpr int width = 8;  // fixed, so that the compiler maps the loops onto what it has
  float v[width];

  static Vec fill(float a) {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = a;
    return r;
  }
  static Vec zero() { return fill(0.0f); }
  template <class T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < width; ++i) narrow(v[i], p + i);
  }
  Vec operator+(Vec b) const {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = v[i] + b.v[i];
    return r;
  }
  Vec operator-(Vec b) const {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = v[i] - b.v[i];
    return r;
  }
  Vec operator*(Vec b) const {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = v[i] * b.v[i];
    return r;
  }
  static Vec max(Vec a, Vec b) {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return r;
  }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
};

#endif

#if defined(__AVX512F__)
template <class T>
inline Vec load_tail(const T* p, int64_t n) {
  return Vec::load_first(p, n);
}
template <class T>
inline void store_tail(Vec a, T* p, int64_t n) {
  a.store_first(p, n);
}
#else
// The last n < width elements go through a small buffer: no byte outside the row is touched.
template <class T>
inline Vec load_tail(const T* p, int64_t n) {
  T buffer[Vec::width];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, p, (size_t)n * sizeof(T));
  return Vec::load(buffer);
}
template <class T>
inline void store_tail(Vec a, T* p, int64_t n) {
  T buffer[Vec::width];
  a.store(buffer);
  memcpy(p, buffer, (size_t)n * sizeof(T));
}
#endif

// Calls body(i, n) for consecutive pieces of [0, D); n == Vec::width except for the last.
template <class T>
inline Vec load_n(const T* p, int64_t n) {
  return n == Vec::width ? Vec::load(p) : load_tail(p, n);
}
template <class T>
inline void store_n(Vec a, T* p, int64_t n) {
  if (n == Vec::width)
    a.store(p);
  else
    store_tail(a, p, n);
}

// Lanes 2i and 2i + 1 exchanged.
inline Vec swap_pairs(Vec a) {
#if defined(__AVX512F__)
  return {_mm512_permute_ps(a.v, 0b10110001)};
#elif defined(__AVX2__)
  return {_mm256_permute_ps(a.v, 0b10110001)};
#else
  Vec r;
  for (int i = 0; i < Vec::width; ++i) r.v[i] = a.v[i ^ 1];
  return r;
#endif
}

inline float sum_lanes(Vec a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(a.v);
#else
  float lanes[Vec::width];
  a.store(lanes);
  for (int half = Vec::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
