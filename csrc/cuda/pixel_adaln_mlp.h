#pragma once

#include <stdexcept>
#include <string>

#include "../dtype.h"

namespace pixeldiff::cuda {

// q <- q + gate1 * a;  q <- q + gate2 * (fc2 gelu(fc1 (rms_norm(q) * norm * (1 + scale) + shift)))
// with (gate1, shift, scale, gate2) chunks 2 to 5 of ada u. Pixels of 16 channels; what has no
// strides is contiguous.
struct PixelAdalnMlpArgs {
  int64_t rows, pixels, D, hidden;
  DType dtype;    // of every tensor
  const void* q;  // (rows, pixels, 16)
  int64_t q_stride_row, q_stride_pixel;
  const void* u;  // (rows, D)
  int64_t u_stride;
  const void* a;           // (rows, pixels, 16), expanded from the attention token
  const void* ada_weight;  // (96*pixels, D)
  int64_t ada_stride;
  const void* ada_bias;    // (96*pixels,)
  const void* norm;        // (16,)
  const void* fc1_weight;  // (hidden, 16)
  const void* fc1_bias;    // (hidden,)
  const void* fc2_weight;  // (16, hidden)
  const void* fc2_bias;    // (16,)
  void* out;               // (rows, pixels, 16)
  float eps;
};

// What the kernel relies on. Throws std::invalid_argument.
inline void check_args(const PixelAdalnMlpArgs& a) {
  const auto refuse = [](const char* what) { throw std::invalid_argument(what); };
  if (a.dtype == DType::f32) refuse("fp32 has no such kernel");
  if (a.rows < 1 || a.pixels < 1 || a.D < 1) refuse("sizes must be positive");
  if (a.hidden < 16 || a.hidden % 16 || a.hidden > 256)
    refuse("the MLP's width must be a multiple of 16 up to 256");
  // Tiles and rows of the weight are counted in 32 bits.
  if (a.pixels > (1 << 20) || a.D > (1 << 20) || a.rows > (1 << 30) ||
      (a.rows / 256 + 1) * (a.pixels / 4 + 1) > (1 << 20) * (int64_t{1} << 10))
    refuse("too many patches, pixels or channels");
  // Pairs of channels are one load.
  if (a.q_stride_row % 2 || a.q_stride_pixel % 2) refuse("strides of q must be even");
  for (const void* p : {a.q, a.a, a.ada_bias, a.norm, a.fc1_weight, a.fc1_bias, a.fc2_weight,
                        a.fc2_bias, static_cast<const void*>(a.out)})
    if (p == nullptr || reinterpret_cast<uintptr_t>(p) % 4)
      refuse("every tensor must start at a multiple of 4 bytes");
}

// Enqueues the sm_90a kernel on `stream` (a cudaStream_t) of `device`. Throws std::invalid_argument
// as check_args and where the copy engine cannot read u or the weight, std::runtime_error with
// CUDA's own message when the launch fails.
void pixel_adaln_mlp(const PixelAdalnMlpArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
