#pragma once

#include "dtype.h"

namespace pixeldiff {

// r = x + gate * y * rsqrt(mean(y^2) + eps) * weight
struct GatedNormResidualArgs {
  int64_t B, N, D;
  DType dtype;    // of x, y and r
  Rows x;         // (B, N, D)
  Rows y;         // (B, N, D)
  Vector weight;  // (D,)
  Vector gate;    // (B, D) or absent, which is 1
  void* r;        // (B, N, D) contiguous
  float eps;
};

}  // namespace pixeldiff
