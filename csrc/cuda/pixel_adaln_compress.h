#pragma once

#include "pixel_adaln/args.h"

namespace pixeldiff::cuda {

// z = rms_norm(q) * norm * (1 + scale) + shift, with (shift, scale) chunks 0 and 1 of ada u; z is
// `out`. The product that makes attention tokens of z is not part of it.
struct PixelAdalnCompressArgs : PixelAdalnArgs {};

// What the kernel relies on. Throws std::invalid_argument.
inline void check_args(const PixelAdalnCompressArgs& a) {
  check_product(a);
  // Eight channels are one load.
  if (a.q_stride_row % 8 || a.q_stride_pixel % 8) refuse("strides of q must be multiples of 8");
  if (!all_at_multiples_of(16, {a.q, a.ada_bias, a.norm, a.out}))
    refuse("every tensor must start at a multiple of 16 bytes");
}

// Enqueues the sm_90a kernel on `stream` (a cudaStream_t) of `device`. Throws as pixel_adaln_mlp.
void pixel_adaln_compress(const PixelAdalnCompressArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
