// What both pixel_adaln kernels are given.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

#include "../../dtype.h"

namespace pixeldiff::cuda {

// Pixels of 16 channels; what has no strides is contiguous.
struct PixelAdalnArgs {
  int64_t rows, pixels, D;
  DType dtype;    // of every tensor
  const void* q;  // (rows, pixels, 16)
  int64_t q_stride_row, q_stride_pixel;
  const void* u;  // (rows, D)
  int64_t u_stride;
  const void* ada_weight;  // (96*pixels, D)
  int64_t ada_stride;
  const void* ada_bias;  // (96*pixels,)
  const void* norm;      // (16,)
  void* out;             // (rows, pixels, 16)
  float eps;
};

inline void refuse(const char* what) { throw std::invalid_argument(what); }

// Throws std::invalid_argument.
inline void check_product(const PixelAdalnArgs& a) {
  if (a.dtype == DType::f32) refuse("fp32 has no such kernel");
  if (a.rows < 1 || a.pixels < 1 || a.D < 1) refuse("sizes must be positive");
  // Tiles are counted in 32 bits.
  if (a.pixels > (1 << 20) || a.D > (1 << 20) || a.rows > (1 << 30) ||
      (a.rows / 256 + 1) * (a.pixels / 4 + 1) > (1 << 20) * (int64_t{1} << 10))
    refuse("too many patches, pixels or channels");
}

inline bool all_at_multiples_of(unsigned bytes, std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (p == nullptr || reinterpret_cast<uintptr_t>(p) % bytes) return false;
  return true;
}

}  // namespace pixeldiff::cuda
