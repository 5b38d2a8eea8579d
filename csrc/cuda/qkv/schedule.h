// Which rows and columns of the projection a block works on. Blocks stay and take every gridDim-th
// tile, those of the image first and those of the text with what is left of them.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::qkv {

constexpr int kRows = 128;  // of a tile
// Row tiles whose columns are gone through together: the blocks that run at one time read about 8
// tiles of rows and 16 of W, which L2 holds.
constexpr int kBand = 8;

struct Schedule {
  int B;
  int rows[2];  // of an image: of the image's stream, of the text's
  int column_tiles;

  struct Tile {
    int stream;  // 0: image, 1: text
    int b, row, column;
  };

  PIXELDIFF_HOST_DEVICE constexpr int image_tiles(int stream) const {
    return (rows[stream] + kRows - 1) / kRows;
  }
  // Below 2^31, all of them: the launch sees to it.
  PIXELDIFF_HOST_DEVICE constexpr int tiles(int stream) const {
    return B * image_tiles(stream) * column_tiles;
  }
  PIXELDIFF_HOST_DEVICE constexpr int tiles() const { return tiles(0) + tiles(1); }
  PIXELDIFF_HOST_DEVICE constexpr Tile tile(int i) const {
    const int stream = i < tiles(0) ? 0 : 1;
    if (stream) i -= tiles(0);
    const int count = B * image_tiles(stream);
    const int first = i / (kBand * column_tiles) * kBand;
    const int band = count - first < kBand ? count - first : kBand;
    const int within = i - first * column_tiles;
    const int row = first + within % band;
    return {stream, row / image_tiles(stream), row % image_tiles(stream) * kRows, within / band};
  }
};

}  // namespace pixeldiff::qkv
