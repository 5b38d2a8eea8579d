#pragma once

#include "pixel_adaln/args.h"

namespace pixeldiff::cuda {

// q <- q + gate1 * a;  q <- q + gate2 * (fc2 gelu(fc1 (rms_norm(q) * norm * (1 + scale) + shift)))
// with (gate1, shift, scale, gate2) chunks 2 to 5 of ada u.
struct PixelAdalnMlpArgs : PixelAdalnArgs {
  int64_t hidden;
  const void* a;           // (rows, pixels, 16), expanded from the attention token
  const void* fc1_weight;  // (hidden, 16)
  const void* fc1_bias;    // (hidden,)
  const void* fc2_weight;  // (16, hidden)
  const void* fc2_bias;    // (16,)
};

// What the kernel relies on. Throws std::invalid_argument.
inline void check_args(const PixelAdalnMlpArgs& a) {
  check_product(a);
  if (a.hidden < 16 || a.hidden % 16 || a.hidden > 256)
    refuse("the MLP's width must be a multiple of 16 up to 256");
  // Pairs of channels are one load.
  if (a.q_stride_row % 2 || a.q_stride_pixel % 2) refuse("strides of q must be even");
  if (!all_at_multiples_of(4, {a.q, a.a, a.ada_bias, a.norm, a.fc1_weight, a.fc1_bias, a.fc2_weight,
                               a.fc2_bias, a.out}))
    refuse("every tensor must start at a multiple of 4 bytes");
}

// Enqueues the sm_90a kernel on `stream` (a cudaStream_t) of `device`. Throws std::invalid_argument
// as check_args and where the copy engine cannot read u or the weight, std::runtime_error with
// CUDA's own message when the launch fails.
void pixel_adaln_mlp(const PixelAdalnMlpArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
