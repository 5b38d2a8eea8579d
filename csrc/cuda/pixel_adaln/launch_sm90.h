// Both sides of the product as the copy engine is told of them, and the kernels' parameters.
#pragma once

#include "../hopper/tensor_map.h"
#include "../pixel_adaln_compress.h"
#include "../pixel_adaln_mlp.h"
#include "compress.h"
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

template <bool kBf16>
Compress<kBf16> compress_of(const cuda::PixelAdalnCompressArgs& a) {
  return {static_cast<int>(a.rows),
          static_cast<int>(a.pixels),
          {a.q, a.q_stride_row, a.q_stride_pixel},
          a.ada_bias,
          a.norm,
          a.out,
          a.eps};
}

// (rows, D), a step's channels of a block's half of the patches.
template <class Tile>
hopper::TensorMapSpec patches_map(const cuda::PixelAdalnArgs& a) {
  return hopper::heads_map({a.u, 0, a.u_stride, 0}, a.dtype == DType::bf16, 1, a.rows, 1, a.D,
                           Tile::kDepth, Tile::kBoxRows);
}

// (pixels, octets, 8, D), a step's channels of the rows that columns.h says.
template <class Tile>
hopper::TensorMapSpec weights_map(const cuda::PixelAdalnArgs& a) {
  const int64_t row = a.ada_stride;
  auto spec =
      hopper::heads_map({a.ada_weight, kOctets * 8 * row, 8 * row, row}, a.dtype == DType::bf16,
                        a.pixels, kOctets, 8, a.D, Tile::kDepth, Tile::kBoxOctets);
  spec.box[1] = Tile::kBoxOctetRows;
  spec.box[3] = Tile::kBoxPixels;
  return spec;
}

}  // namespace pixeldiff::pixel_adaln
