#pragma once

#include "dtype.h"

namespace pixeldiff {

// y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale) + shift
struct RmsNormModulateArgs {
  int64_t B, N, D;
  DType dtype;    // of x and y
  Rows x;         // (B, N, D)
  Vector weight;  // (D,)
  Vector scale;   // (B, D)
  Vector shift;   // (B, D) or absent
  void* y;        // (B, N, D) contiguous
  float eps;
};

}  // namespace pixeldiff
