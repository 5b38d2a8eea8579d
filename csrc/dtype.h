// Storage types shared by the Python side and every kernel. The codes are part of the interface of
// `pixeldiff._C` (pixeldiff/native.py holds the same table).
#pragma once

#include <cstdint>

namespace pixeldiff {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A per-channel vector: (D,) or, with a stride over images, (B, D). `data` is null when absent.
struct Vector {
  const void* data;
  DType dtype;
  int64_t stride_b;  // elements between images, 0 when every image shares it
};

// A (B, N, D) tensor whose last axis is contiguous; strides in elements.
struct Rows {
  const void* data;
  int64_t stride_b;
  int64_t stride_n;
};

}  // namespace pixeldiff
