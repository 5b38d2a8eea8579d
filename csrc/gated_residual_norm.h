#pragma once

#include "dtype.h"

namespace pixeldiff {

// x_new = x + gate * y, rounded to the storage type; h = rms_norm_modulate(x_new, weight, scale,
// shift)
struct GatedResidualNormArgs {
  int64_t B, N, D;
  DType dtype;    // of x, y, x_new and h
  Rows x;         // (B, N, D)
  Rows y;         // (B, N, D)
  Vector gate;    // (B, D)
  Vector weight;  // (D,)
  Vector scale;   // (B, D)
  Vector shift;   // (B, D) or absent
  void* x_new;    // (B, N, D) contiguous
  void* h;        // (B, N, D) contiguous
  float eps;
};

}  // namespace pixeldiff
