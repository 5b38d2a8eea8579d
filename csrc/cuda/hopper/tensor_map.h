// What the copy engine is told of a (B, rows, G, d) tensor, and whether it can read it.
#pragma once

#include <cstdint>

#include "../../joint_attention.h"

namespace pixeldiff::hopper {

// The arguments of cuTensorMapEncodeTiled for 16-bit elements, innermost axis first: channels,
// heads, rows, images.
struct TensorMapSpec {
  const void* data;
  bool bf16;             // else fp16
  uint64_t size[4];      // elements
  uint64_t stride[3];    // bytes, of axes 1 to 3
  uint32_t box[4];       // elements
  uint32_t swizzle;      // bytes of a row of the box: 32, 64 or 128
  uint32_t element = 2;  // bytes; 1 is neither bf16 nor fp16
};

// One panel of `columns` channels by `rows` rows of one head. What lies outside is read as 0.
inline TensorMapSpec heads_map(const Heads& t, bool bf16, int64_t B, int64_t rows, int64_t G,
                               int64_t d, uint32_t columns, uint32_t box_rows) {
  // The stride of an axis of one element is never used, and may be anything.
  const auto bytes = [](int64_t stride, int64_t size) {
    return size == 1 ? uint64_t{16} : static_cast<uint64_t>(stride) * 2;
  };
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  return {t.data,
          bf16,
          {size(d), size(G), size(rows), size(B)},
          {bytes(t.stride_g, G), bytes(t.stride_n, rows), bytes(t.stride_b, B)},
          {columns, 1, box_rows, 1},
          columns * 2};
}

// The same for elements of one byte.
inline TensorMapSpec bytes_map(const Heads& t, int64_t B, int64_t rows, int64_t G, int64_t d,
                               uint32_t columns, uint32_t box_rows) {
  TensorMapSpec spec = heads_map(t, false, B, rows, G, d, columns, box_rows);
  const int64_t strides[] = {t.stride_g, t.stride_n, t.stride_b};
  for (int axis = 0; axis < 3; ++axis)
    if (spec.size[axis + 1] > 1) spec.stride[axis] = static_cast<uint64_t>(strides[axis]);
  spec.swizzle = columns;
  spec.element = 1;
  return spec;
}

// The limits of the copy engine, or nullptr where they are kept.
inline const char* why_not(const TensorMapSpec& map) {
  if (reinterpret_cast<uintptr_t>(map.data) % 16) return "must start at a multiple of 16 bytes";
  for (const uint64_t stride : map.stride) {
    if (stride == 0 || stride % 16) return "needs strides that are positive multiples of 16 bytes";
    if (stride >= uint64_t{1} << 40) return "needs strides below 2^40 bytes";
  }
  for (const uint64_t size : map.size)
    if (size == 0 || size > 0x7fffffff) return "needs axes of 1 to 2^31 - 1 elements";
  return nullptr;
}

}  // namespace pixeldiff::hopper
