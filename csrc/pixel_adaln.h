#pragma once

#include "dtype.h"

namespace pixeldiff {

// Pixels [first, first + J) of R patches of a pixel stream, and their modulation, which a GEMM has
// just left in a buffer: one plane of J pixels for every chunk and channel.
struct PixelGroup {
  int64_t R, J, p;
  DType dtype;           // of the stream, the modulation, the expanded attention and the results
  int64_t patch_stride;  // elements between patches of q and of the results
  const void* q;         // (R, J, p), a window of (R, P*P, p)
  const void* mod;       // (R, chunks, p, J) contiguous
  const float* norm;     // (p,)
  float eps;
};

// z = rms_norm(q) * norm * (1 + scale) + shift; chunks shift, scale
struct PixelAdalnCompressArgs {
  PixelGroup group;
  void* z;  // (R, J, p), a window as q
};

// q <- q + gate1 * attn;  q <- q + gate2 * fc2 gelu(fc1 (rms_norm(q) * norm * (1 + scale) + shift))
// chunks gate1, shift, scale, gate2
struct PixelAdalnMlpArgs {
  PixelGroup group;
  const void* attn;  // (R, J, p) contiguous, expanded from the attention token
  int64_t hidden;
  const float *fc1_weight, *fc1_bias;   // (hidden, p), (hidden,)
  const float *fc2_columns, *fc2_bias;  // (hidden, p): fc2's weight transposed; (p,)
  void* out;                            // (R, J, p), a window as q
};

}  // namespace pixeldiff
