#pragma once

#include "dtype.h"

namespace pixeldiff {

// y = x + sigmoid(x weight^T + lq_logit) * feature, one logit a token
struct SigmaGatePerTokenArgs {
  int64_t B, N, D;
  DType dtype;        // of x, feature and y
  Rows x;             // (B, N, D)
  Rows feature;       // (B, N, D)
  Vector weight;      // (D,)
  Rows lq_logit;      // (B, N, 1)
  DType logit_dtype;  // of lq_logit
  void* y;            // (B, N, D) contiguous
};

// y = x + sigmoid(product + lq_logit) * feature, one logit a channel
struct SigmaGatePerChannelArgs {
  int64_t B, N, D;
  DType dtype;        // of x, feature, product and y
  Rows x;             // (B, N, D)
  Rows feature;       // (B, N, D)
  Rows product;       // (B, N, D), x weight^T
  Rows lq_logit;      // (B, N, D)
  DType logit_dtype;  // of lq_logit: dtype or f32
  void* y;            // (B, N, D) contiguous
};

}  // namespace pixeldiff
