#pragma once

#include <stdexcept>

#include "../dtype.h"
#include "local_decoder/pictures.h"

namespace pixeldiff::cuda {

// skip = silu(conv3x3(x) + bias), pooled = max over each 2x2 square of skip. All is bf16 but x.
struct LocalDecoderDownArgs {
  int64_t B, rows, columns;  // of squares: those of pooled; x and skip have twice as many
  int64_t Ci, Co;
  DType x_dtype;     // bf16: a pixel's channels side by side; f32: a plane for each channel
  Picture x;         // B images of Ci; pixels of a row side by side
  int64_t x_plane;   // elements from a channel of x to the next; of bf16 1
  Taps weight;       // (Co, Ci, 3, 3); Co 16, of f32 also 3
  const void* bias;  // (Co,) contiguous
  void* skip;        // (B, 2*rows, 2*columns, Co) contiguous
  void* pooled;      // (B, rows, columns, Co) contiguous
};

// What the kernel relies on. Throws std::invalid_argument.
inline void check_args(const LocalDecoderDownArgs& a) {
  const auto refuse = [](const char* what) { throw std::invalid_argument(what); };
  const auto wrong = [](int64_t n, int64_t most) { return n < 1 || n > most; };
  // Strips and rows are counted in 32 bits.
  if (wrong(a.B, 1 << 20) || wrong(a.rows, 1 << 28) || wrong(a.columns, 1 << 28) ||
      a.B * (a.columns / 64 + 1) > 1 << 20)
    refuse("sizes must be positive, and at most 2^20 strips of 128 columns of x");
  // Its kernel finds weights in 32 bits.
  for (const int64_t stride :
       {a.weight.stride_n, a.weight.stride_c, a.weight.stride_r, a.weight.stride_s})
    if (stride < 0 || stride > 1 << 24) refuse("strides of weight must be at most 2^24 elements");
  const bool planes = a.x_dtype == DType::f32;
  if (!planes && a.x_dtype != DType::bf16) refuse("x must be bf16 or f32");
  if (a.Ci != 3 || (a.Co != 16 && !(planes && a.Co == 3)))
    refuse("x must have 3 channels, weight 16 rows, or 3 where x is f32");
  if (a.x.stride_w != (planes ? 1 : 3) || (!planes && a.x_plane != 1) ||
      a.columns % (planes ? 2 : 4))
    refuse(
        "pixels of a row of x must be side by side, of f32 channel by channel, and a multiple of "
        "16 bytes");
  const int64_t piece = planes ? 4 : 8;
  if (a.x.stride_b % piece || a.x.stride_h % piece || (planes && a.x_plane % piece))
    refuse("strides of x must be multiples of 16 bytes");
  for (const void* p :
       {a.x.data, static_cast<const void*>(a.skip), static_cast<const void*>(a.pooled)})
    if (p == nullptr || reinterpret_cast<uintptr_t>(p) % 16)
      refuse("x, skip and pooled must start at a multiple of 16 bytes");
  for (const void* p : {a.weight.data, a.bias})
    if (p == nullptr || reinterpret_cast<uintptr_t>(p) % 2)
      refuse("weight and bias must start at a multiple of 2 bytes");
}

// Enqueues the kernel on `stream` (a cudaStream_t) of `device`. Throws std::invalid_argument as
// check_args, std::runtime_error with CUDA's own message when a launch fails.
void local_decoder_down(const LocalDecoderDownArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
