// Which patches and pixels a cluster works on. Clusters stay and take every so-many-th tile.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::pixel_adaln {

// A tile of a cluster is its four blocks' tiles, two by two.
struct Schedule {
  int rows;    // patches
  int pixels;  // of a patch
  int D;
  int tile_rows, tile_pixels;  // of a cluster
  int depth;                   // of D in a step
  int group;                   // tiles of patches that are gone through before the next pixels are

  struct Tile {
    int row, pixel;  // the first
  };

  PIXELDIFF_HOST_DEVICE constexpr int row_tiles() const {
    return (rows + tile_rows - 1) / tile_rows;
  }
  PIXELDIFF_HOST_DEVICE constexpr int pixel_tiles() const {
    return (pixels + tile_pixels - 1) / tile_pixels;
  }
  PIXELDIFF_HOST_DEVICE constexpr int steps() const { return (D + depth - 1) / depth; }
  // Below 2^31: the launch sees to it.
  PIXELDIFF_HOST_DEVICE constexpr int tiles() const { return row_tiles() * pixel_tiles(); }
  // Patches of a group are the inner loop: their u and the weights of the pixels that are under way
  // stay in the second-level cache.
  PIXELDIFF_HOST_DEVICE constexpr Tile tile(int i) const {
    const int all = group * pixel_tiles();
    const int first = i / all * group;
    const int left = row_tiles() - first;
    const int size = left < group ? left : group;
    return {(first + i % all % size) * tile_rows, i % all / size * tile_pixels};
  }
};

}  // namespace pixeldiff::pixel_adaln
