// What the row-normalising kernels share: per-image factors in fp32, the mean square of a row, and
// the normalising pass. Included once per instruction set (see simd.h).
#pragma once

#include "../dtype.h"
#include "simd.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
inline void widen_vector(const T* p, int64_t D, float* out) {
  for (int64_t i = 0; i < D; i += Vec::width) {
    const int64_t n = min_i64(D - i, Vec::width);
    store_n(load_n(p + i, n), out + i, n);
  }
}

// out[0..D) = the vector of image b in fp32, zeros when it is absent.
inline void widen_vector(const Vector& vector, int64_t b, int64_t D, float* out) {
  const int64_t offset = b * vector.stride_b;
  if (vector.data == nullptr) {
    memset(out, 0, (size_t)D * sizeof(float));
  } else if (vector.dtype == DType::f32) {
    widen_vector((const float*)vector.data + offset, D, out);
  } else if (vector.dtype == DType::bf16) {
    widen_vector((const bf16*)vector.data + offset, D, out);
  } else {
    widen_vector((const f16*)vector.data + offset, D, out);
  }
}

// gain = weight * (1 + scale), so that the normalising pass is one multiply-add per element.
inline void prepare_gain(const Vector& weight, const Vector& scale, int64_t b, int64_t D,
                         float* gain, float* scratch) {
  widen_vector(scale, b, D, gain);
  widen_vector(weight, b, D, scratch);
  for (int64_t i = 0; i < D; ++i) gain[i] = scratch[i] * (1.0f + gain[i]);
}

// 1 / sqrt(sum / D + eps). The square root and the division round once each; the processor's
// approximate reciprocal root would not.
inline float inverse_rms(float sum_of_squares, int64_t D, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / (float)D + eps);
}

template <class T>
inline float sum_of_squares(const T* row, int64_t D) {
  constexpr int W = Vec::width;
  Vec a = Vec::zero(), b = Vec::zero(), c = Vec::zero(), d = Vec::zero();
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W) {  // four chains hide the latency of the multiply-add
    const Vec p = Vec::load(row + i), q = Vec::load(row + i + W);
    const Vec r = Vec::load(row + i + 2 * W), s = Vec::load(row + i + 3 * W);
    a = Vec::fma(p, p, a);
    b = Vec::fma(q, q, b);
    c = Vec::fma(r, r, c);
    d = Vec::fma(s, s, d);
  }
  for (; i < D; i += W) {
    const Vec p = load_n(row + i, min_i64(D - i, W));
    a = Vec::fma(p, p, a);
  }
  return sum_lanes((a + b) + (c + d));
}

// out = row * inverse_rms * gain + shift
template <class T, class Shift>
inline void normalise_row(const T* row, float inverse, const float* gain, const Shift* shift,
                          int64_t D, T* out) {
  constexpr int W = Vec::width;
  const Vec r = Vec::fill(inverse);
  int64_t i = 0;
  for (; i + W <= D; i += W) {
    const Vec x = Vec::load(row + i) * r;
    Vec::fma(x, Vec::load(gain + i), Vec::load(shift + i)).store(out + i);
  }
  if (i < D) {
    const int64_t n = D - i;
    const Vec x = load_tail(row + i, n) * r;
    store_tail(Vec::fma(x, load_tail(gain + i, n), load_tail(shift + i, n)), out + i, n);
  }
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
