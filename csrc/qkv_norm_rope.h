#pragma once

#include "dtype.h"

namespace pixeldiff {

// One stream of rows, text or image, with its own projection, norms and rotary tables.
struct QkvStream {
  int64_t rows;
  Rows x;                          // (B, rows, K)
  const void* weight;              // (3 * G * d, K), rows [q | k | v], each head-major
  int64_t weight_stride;           // elements between its rows
  const void* q_weight;            // (d,), dtype of x
  const void* k_weight;            // (d,)
  const float* cos;                // (rows, d / 2)
  const float* sin;                // (rows, d / 2)
  int64_t cos_stride, sin_stride;  // elements between rows of the tables
};

// qkv = x weight^T, rounded; then q, k: x * rsqrt(mean(x^2 over the head) + eps) * weight, channel
// pair (2s, 2s + 1) turned by the row's angle of slot s; v as it is
struct QkvNormRopeArgs {
  int64_t B, K, G, d;
  DType dtype;      // of x, weight, the norms' weights and out
  QkvStream text;   // rows may be 0, the rest is then not read
  QkvStream image;  //
  void* out;        // (3, B, text rows + image rows, G, d) contiguous
  float eps;
};

}  // namespace pixeldiff
