#pragma once

#include <stdexcept>

#include "../dtype.h"
#include "local_decoder/pictures.h"

namespace pixeldiff::cuda {

// y = silu(conv3x3([u, skip]) + bias), u = conv3x3(x doubled) + up_bias. All is bf16.
struct LocalDecoderUpArgs {
  int64_t B, S, rows, columns;  // of x; skip and out have twice as many rows and columns
  int64_t Ci, Cu, Cs, Co;
  Picture x;            // B images of Ci, whose channels are side by side, as those of skip
  Picture skip;         // S images of Cs; image b reads b % S. Pixels of 3 are side by side
  Taps up_weight;       // (Cu, Ci, 3, 3)
  const void* up_bias;  // (Cu,) contiguous
  Taps weight;          // (Co, Cu + Cs, 3, 3)
  const void* bias;     // (Co,) contiguous
  void* workspace;      // of as many bytes as local_decoder_up_workspace says
  void* out;            // (B, 2*rows, 2*columns, Co) contiguous
};

// What the kernel relies on. Throws std::invalid_argument.
inline void check_args(const LocalDecoderUpArgs& a) {
  const auto refuse = [](const char* what) { throw std::invalid_argument(what); };
  const auto wrong = [](int64_t n, int64_t most) { return n < 1 || n > most; };
  if (wrong(a.B, 1 << 30) || wrong(a.S, a.B) || a.B % a.S) refuse("S must divide B");
  // Strips and rows are counted in 32 bits.
  if (wrong(a.rows, 1 << 28) || wrong(a.columns, 1 << 28) || a.B * (a.columns / 16 + 1) > 1 << 20)
    refuse("sizes must be positive, and at most 2^20 strips of 16 columns of x");
  const bool packed = a.Cs == 3;
  if (wrong(a.Ci, 32) || a.Ci % 8 || (!packed && (wrong(a.Cs, 32) || a.Cs % 8)))
    refuse("x must have a multiple of 8 channels up to 32, skip too or 3");
  if (wrong(a.Cu, 32) || a.Co != 16) refuse("up_weight must have 1 to 32 rows, weight 16");
  if (packed && (a.skip.stride_w != 3 || a.columns % 4))
    refuse("pixels of 3 channels of skip must be side by side, and their columns a multiple of 8");
  for (const Picture* t : {&a.x, &a.skip}) {
    const bool apart = packed && t == &a.skip;  // pixels of it are not
    if (t->stride_b % 8 || t->stride_h % 8 || (!apart && t->stride_w % 8))
      refuse("strides of x and skip must be multiples of 16 bytes");
    if (t->data == nullptr || reinterpret_cast<uintptr_t>(t->data) % 16)
      refuse("x and skip must start at a multiple of 16 bytes");
  }
  for (const void* p : {static_cast<const void*>(a.out), static_cast<const void*>(a.workspace)})
    if (p == nullptr || reinterpret_cast<uintptr_t>(p) % 16)
      refuse("out and workspace must start at a multiple of 16 bytes");
  for (const void* p : {a.up_weight.data, a.up_bias, a.weight.data, a.bias})
    if (p == nullptr || reinterpret_cast<uintptr_t>(p) % 2)
      refuse("weights and biases must start at a multiple of 2 bytes");
}

// Bytes of the workspace.
int64_t local_decoder_up_workspace(int64_t Ci, int64_t Cs);

// Enqueues the kernels on `stream` (a cudaStream_t) of `device`. Throws std::invalid_argument as
// check_args, std::runtime_error with CUDA's own message when a launch fails.
void local_decoder_up(const LocalDecoderUpArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
