#pragma once

#include "dtype.h"

namespace pixeldiff {

// A (B, rows, G, d) tensor whose last axis is contiguous; strides in elements.
struct Heads {
  const void* data;
  int64_t stride_b;
  int64_t stride_n;
  int64_t stride_g;
};

// o = softmax(scale * q k^T) v and lse = ln(sum(exp(scale * q k^T))), per image and head
struct JointAttentionArgs {
  int64_t B, L, S, G, d;
  DType dtype;  // of all four tensors
  Heads q;      // (B, L, G, d)
  Heads k;      // (B, S, G, d)
  Heads v;      // (B, S, G, d)
  void* o;      // (B, L, G, d) contiguous
  float scale;
  const uint8_t* key_mask;  // (B, S), not 0 = takes part; nullptr = all do
  int64_t mask_stride_b;
  float* lse;  // (B, L, G) contiguous, or nullptr
};

}  // namespace pixeldiff
