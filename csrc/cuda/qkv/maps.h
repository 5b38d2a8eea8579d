// What the copy engine is told of the two operands.
#pragma once

#include "../../qkv_norm_rope.h"
#include "../hopper/tensor_map.h"
#include "sm90_tile.h"

namespace pixeldiff::qkv {

// 64 channels by 128 rows of x.
inline hopper::TensorMapSpec x_map(const QkvNormRopeArgs& a, const QkvStream& stream) {
  return hopper::heads_map({stream.x.data, stream.x.stride_b, stream.x.stride_n, 0},
                           a.dtype == DType::bf16, a.B, stream.rows, 1, a.K, kDepth, kRows);
}

// W as octets of rows: some rows of each octet of a tile, 64 channels of them (columns.h).
template <class Columns>
hopper::TensorMapSpec weight_map(const QkvNormRopeArgs& a, const QkvStream& stream) {
  const int64_t octets = 3 * a.G * a.d / 8, row = stream.weight_stride;
  auto spec = hopper::heads_map({stream.weight, 0, 8 * row, row}, a.dtype == DType::bf16, 1, octets,
                                8, a.K, kDepth, Columns::kOctets);
  spec.box[1] = Columns::kOctetRows;
  return spec;
}

}  // namespace pixeldiff::qkv
