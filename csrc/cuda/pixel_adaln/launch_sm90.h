// Both of the kernel's products' sides as the copy engine is told of them, and its parameters.
#pragma once

#include "../hopper/tensor_map.h"
#include "../pixel_adaln_mlp.h"
#include "mlp.h"

namespace pixeldiff::pixel_adaln {

// u of a piece (6 MB at 1536 channels) and the weights under way both stay in the cache.
constexpr int kGroupPatches = 2048;

template <class Tile>
Schedule schedule_of(int64_t rows, int64_t pixels, int64_t D) {
  const auto count = [](int64_t n) { return static_cast<int>(n); };
  constexpr int kRows = kClusterSide * Tile::kRows;
  return {count(rows),  count(pixels),        count(D), kRows, kClusterSide * Tile::kPixels,
          Tile::kDepth, kGroupPatches / kRows};
}

// (rows, D), in boxes of `box_rows` by a step's channels.
inline hopper::TensorMapSpec matrix_map(const void* data, bool bf16, int64_t rows, int64_t D,
                                        int64_t stride, int depth, int box_rows) {
  return hopper::heads_map({data, 0, stride, 0}, bf16, 1, rows, 1, D, static_cast<uint32_t>(depth),
                           static_cast<uint32_t>(box_rows));
}

template <bool kBf16>
Mlp<kBf16> mlp_of(const cuda::PixelAdalnMlpArgs& a) {
  return {static_cast<int>(a.rows),
          static_cast<int>(a.pixels),
          static_cast<int>(a.hidden),
          {a.q, a.q_stride_row, a.q_stride_pixel},
          {a.a, a.pixels * kChannels, kChannels},
          a.ada_bias,
          a.norm,
          a.fc1_weight,
          a.fc1_bias,
          a.fc2_weight,
          a.fc2_bias,
          a.out,
          a.eps};
}

template <class Tile>
hopper::TensorMapSpec patches_map(const cuda::PixelAdalnMlpArgs& a) {
  return matrix_map(a.u, a.dtype == DType::bf16, a.rows, a.D, a.u_stride, Tile::kDepth,
                    Tile::kBoxRows);
}

template <class Tile>
hopper::TensorMapSpec weights_map(const cuda::PixelAdalnMlpArgs& a) {
  return matrix_map(a.ada_weight, a.dtype == DType::bf16, kChunks * kChannels * a.pixels, a.D,
                    a.ada_stride, Tile::kDepth, Tile::kPixelColumns);
}

}  // namespace pixeldiff::pixel_adaln
