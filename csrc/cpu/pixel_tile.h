// A tile: Vec::width consecutive pixels of a pixel stream, one Vec for every channel. In memory a
// pixel's p channels lie together, so loading and storing a tile turns it around; in between norms
// and tiny matrices need no sums across lanes, whatever p is.
//
// Kernels are compiled for p = 8 and 16, where the loops over channels unroll into registers, and
// once for any multiple of 4 up to kMaxChannels (C = 0).
#pragma once

#include "norm_rows.h"
#include "simd_math.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

constexpr int kMaxChannels = 64;

template <int C>
struct Tile {
  Vec at[C ? C : kMaxChannels];
};

// Lane group l holds the four floats at p + l * step.
#if defined(__AVX512F__)
static inline Vec load_quads(const float* p, int64_t step) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + step), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * step), 2);
  return {_mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * step), 3)};
}
static inline void store_quads(Vec a, float* p, int64_t step) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(a.v));
  _mm_storeu_ps(p + step, _mm512_extractf32x4_ps(a.v, 1));
  _mm_storeu_ps(p + 2 * step, _mm512_extractf32x4_ps(a.v, 2));
  _mm_storeu_ps(p + 3 * step, _mm512_extractf32x4_ps(a.v, 3));
}
// Transposes the 4 x 4 floats in every lane group of four vectors.
static inline void transpose_quads(Vec* r) {
  const __m512 a = _mm512_unpacklo_ps(r[0].v, r[1].v), b = _mm512_unpackhi_ps(r[0].v, r[1].v);
  const __m512 c = _mm512_unpacklo_ps(r[2].v, r[3].v), d = _mm512_unpackhi_ps(r[2].v, r[3].v);
  r[0].v = _mm512_shuffle_ps(a, c, 0x44);
  r[1].v = _mm512_shuffle_ps(a, c, 0xee);
  r[2].v = _mm512_shuffle_ps(b, d, 0x44);
  r[3].v = _mm512_shuffle_ps(b, d, 0xee);
}
#elif defined(__AVX2__)
static inline Vec load_quads(const float* p, int64_t step) {
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1)};
}
static inline void store_quads(Vec a, float* p, int64_t step) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(a.v));
  _mm_storeu_ps(p + step, _mm256_extractf128_ps(a.v, 1));
}
static inline void transpose_quads(Vec* r) {
  const __m256 a = _mm256_unpacklo_ps(r[0].v, r[1].v), b = _mm256_unpackhi_ps(r[0].v, r[1].v);
  const __m256 c = _mm256_unpacklo_ps(r[2].v, r[3].v), d = _mm256_unpackhi_ps(r[2].v, r[3].v);
  r[0].v = _mm256_shuffle_ps(a, c, 0x44);
  r[1].v = _mm256_shuffle_ps(a, c, 0xee);
  r[2].v = _mm256_shuffle_ps(b, d, 0x44);
  r[3].v = _mm256_shuffle_ps(b, d, 0xee);
}
#else
static inline Vec load_quads(const float* p, int64_t step) {
  Vec a;
  for (int i = 0; i < Vec::width; ++i) a.v[i] = p[i / 4 * step + i % 4];
  return a;
}
static inline void store_quads(Vec a, float* p, int64_t step) {
  for (int i = 0; i < Vec::width; ++i) p[i / 4 * step + i % 4] = a.v[i];
}
static inline void transpose_quads(Vec* r) {
  Vec t[4];
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < Vec::width; ++i) t[k].v[i] = r[i % 4].v[i / 4 * 4 + k];
  for (int k = 0; k < 4; ++k) r[k] = t[k];
}
#endif

// n <= Vec::width pixels of p channels; the lanes beyond are zero.
template <int C, class T>
static inline void load_tile(const T* pixels, int64_t n, int64_t channels, Tile<C>& x) {
  const int64_t p = C ? C : channels;
  alignas(64) float wide[(C ? C : kMaxChannels) * Vec::width];
  const float* from = wide;
  if (sizeof(T) == sizeof(float) && n == Vec::width) {
    from = (const float*)pixels;
  } else {
    widen_vector(pixels, n * p, wide);
    if (n < Vec::width) memset(wide + n * p, 0, (size_t)((Vec::width - n) * p) * sizeof(float));
  }
#pragma GCC unroll 4
  for (int64_t c = 0; c < p; c += 4) {
    for (int k = 0; k < 4; ++k) x.at[c + k] = load_quads(from + k * p + c, 4 * p);
    transpose_quads(x.at + c);
  }
}

template <int C, class T>
static inline void store_tile(Tile<C>& x, int64_t n, int64_t channels, T* pixels) {
  const int64_t p = C ? C : channels;
  alignas(64) float wide[(C ? C : kMaxChannels) * Vec::width];
  const bool direct = sizeof(T) == sizeof(float) && n == Vec::width;
  float* to = direct ? (float*)pixels : wide;
#pragma GCC unroll 4
  for (int64_t c = 0; c < p; c += 4) {
    transpose_quads(x.at + c);
    for (int k = 0; k < 4; ++k) store_quads(x.at[c + k], to + k * p + c, 4 * p);
  }
  if (direct) return;
  for (int64_t i = 0; i < n * p; i += Vec::width)
    store_n(Vec::load(wide + i), pixels + i, min_i64(n * p - i, Vec::width));
}

// 1 / sqrt(mean of the squares over the channels + eps), for every pixel
template <int C>
static inline Vec inverse_rms(const Tile<C>& x, int64_t channels, float eps) {
  const int64_t p = C ? C : channels;
  Vec even = Vec::zero(), odd = Vec::zero();  // two chains
#pragma GCC unroll 8
  for (int64_t c = 0; c < p; c += 2) {
    even = Vec::fma(x.at[c], x.at[c], even);
    odd = Vec::fma(x.at[c + 1], x.at[c + 1], odd);
  }
  const Vec mean = divide(even + odd, Vec::fill((float)p)) + Vec::fill(eps);
  return divide(Vec::fill(1.0f), square_root(mean));
}

// h = x / rms(x) * norm * (1 + scale) + shift, scale and shift in planes of `stride` pixels
template <int C, class T>
static inline void norm_modulate(const Tile<C>& x, int64_t channels, const float* norm, float eps,
                                 const T* scale, const T* shift, int64_t stride, int64_t n,
                                 Tile<C>& h) {
  const int64_t p = C ? C : channels;
  const Vec inverse = inverse_rms(x, p, eps), one = Vec::fill(1.0f);
#pragma GCC unroll 16
  for (int64_t c = 0; c < p; ++c) {
    const Vec normed = x.at[c] * inverse * Vec::fill(norm[c]);
    h.at[c] = Vec::fma(normed, one + load_n(scale + c * stride, n), load_n(shift + c * stride, n));
  }
}

// Runs body<C, T> for the channels and the storage type at hand.
#define PIXELDIFF_FOR_CHANNELS(body, T, p, ...)   \
  {                                               \
    if (p == 8) return body<8, T>(__VA_ARGS__);   \
    if (p == 16) return body<16, T>(__VA_ARGS__); \
    return body<0, T>(__VA_ARGS__);               \
  }
#define PIXELDIFF_FOR_TILES(body, dtype, p, ...)                               \
  if (dtype == DType::f32) PIXELDIFF_FOR_CHANNELS(body, float, p, __VA_ARGS__) \
  if (dtype == DType::bf16) PIXELDIFF_FOR_CHANNELS(body, bf16, p, __VA_ARGS__) \
  PIXELDIFF_FOR_CHANNELS(body, f16, p, __VA_ARGS__)

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
