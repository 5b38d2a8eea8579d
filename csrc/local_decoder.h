#pragma once

#include "dtype.h"

namespace pixeldiff {

// A (B, H, W, C) tensor of any strides, in elements.
struct Pixels {
  const void* data;
  int64_t stride_b, stride_h, stride_w, stride_c;
};

// skip = silu(conv3x3(x) + bias), pooled = the maximum of each 2x2 square of skip
struct LocalDecoderDownArgs {
  int64_t B, H, W;  // H and W even
  int64_t Ci, Co;
  DType x_dtype;        // of x, rounded to dtype first
  Pixels x;             // (B, H, W, Ci)
  DType dtype;          // of the results, whose values the weights have
  const float* weight;  // (Ci, 3, 3, Co) contiguous
  const float* bias;    // (Co,)
  void* skip;           // (B, H, W, Co) contiguous
  void* pooled;         // (B, H/2, W/2, Co) contiguous
};

// u = conv3x3(x doubled) + up_bias, y = silu(conv3x3([u, skip]) + bias)
struct LocalDecoderUpArgs {
  int64_t B, S, H, W;  // of y; image b reads skip b % S
  int64_t Ci, Cu, Cs, Co;
  DType dtype;             // of x, skip and y, whose values the weights have
  Pixels x;                // (B, H/2, W/2, Ci)
  Pixels skip;             // (S, H, W, Cs)
  const float* up_weight;  // (Ci, 3, 3, Cu) contiguous
  const float* up_bias;    // (Cu,)
  const float* weight;     // (Cu + Cs, 3, 3, Co) contiguous
  const float* bias;       // (Co,)
  void* y;                 // (B, H, W, Co) contiguous
};

}  // namespace pixeldiff
