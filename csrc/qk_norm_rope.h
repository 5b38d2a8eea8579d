#pragma once

#include "dtype.h"

namespace pixeldiff {

// One stream of rows, text or image, with its own norms and rotary tables.
struct QkNormRopeStream {
  int64_t rows;
  Rows qkv;                        // (B, rows, 3 * G * d), columns [q | k | v], each head-major
  Vector q_weight;                 // (d,)
  Vector k_weight;                 // (d,)
  const float* cos;                // (rows, d / 2)
  const float* sin;                // (rows, d / 2)
  int64_t cos_stride, sin_stride;  // elements between rows of the tables
};

// q, k: x * rsqrt(mean(x^2 over the head) + eps) * weight, channel pair (2s, 2s + 1) turned by the
// row's angle of slot s; v: copied
struct QkNormRopeArgs {
  int64_t B, G, d;
  DType dtype;             // of qkv and out
  QkNormRopeStream text;   // rows may be 0, the rest is then not read
  QkNormRopeStream image;  //
  void* out;               // (3, B, text rows + image rows, G, d) contiguous
  float eps;
};

}  // namespace pixeldiff
