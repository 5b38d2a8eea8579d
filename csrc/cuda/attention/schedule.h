// Which queries and keys a block works on. Blocks stay and take every gridDim-th tile.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::attention {

struct Schedule {
  int B, L, S, G;
  int rows;  // queries of a tile
  int keys;  // keys of a step

  struct Tile {
    int b, g, row;
  };

  PIXELDIFF_HOST_DEVICE constexpr int row_tiles() const { return (L + rows - 1) / rows; }
  PIXELDIFF_HOST_DEVICE constexpr int steps() const { return (S + keys - 1) / keys; }
  // Below 2^31: the launch sees to it.
  PIXELDIFF_HOST_DEVICE constexpr int tiles() const { return row_tiles() * G * B; }
  // The tiles of a head follow each other: who runs together reads the same K and V, from L2.
  PIXELDIFF_HOST_DEVICE constexpr Tile tile(int i) const {
    const int head = i / row_tiles();
    return {head / G, head % G, i % row_tiles() * rows};
  }
};

}  // namespace pixeldiff::attention
