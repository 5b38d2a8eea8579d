// What a thread of the pixel_adaln kernels reads and writes of the pixels of its sums: two or eight
// neighbouring channels of 16 bits at a time.
#pragma once

#include "../hopper/fragment.h"
#include "sm90_tile.h"

namespace pixeldiff::pixel_adaln {

// (rows, pixels, 16), two bytes an element, channels side by side.
struct Pixels {
  const void* data;
  int64_t stride_row, stride_pixel;  // elements, even
};

// Where a thread stands: which patch a row of its sums is, which channels its columns are.
struct Place {
  int lane, first_row;

  template <class M>
  PIXELDIFF_DEVICE static Place of(const M& m, int tile_row) {
    const int lane = m.thread() % 32, warp = m.thread() % kWarpgroup / 32;
    return {lane, tile_row + hopper::accumulator_row(warp, lane, 0)};
  }
  // `part` of the two m64, `row` of the two rows of each.
  PIXELDIFF_DEVICE int row(int part, int row) const { return first_row + 64 * part + 8 * row; }
  // The first of two, `half` of the 16.
  PIXELDIFF_DEVICE int channel(int half) const {
    return hopper::accumulator_column(lane, 4 * half);
  }
};

PIXELDIFF_HOST_DEVICE int at_most(int i, int last) { return i < last ? i : last; }

// Elements i and i + 1 of 16 bits.
template <class M>
PIXELDIFF_DEVICE uint32_t load_pair(const M& m, const void* data, int64_t i) {
  return m.load(reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + 2 * i));
}

// Eight from element i on.
template <class M>
PIXELDIFF_DEVICE void load_octet(const M& m, const void* data, int64_t i, uint32_t (&octet)[4]) {
  m.template load_words<4>(static_cast<const char*>(data) + 2 * i, octet);
}

// Of patches and pixels past the last one the last one's values.
template <class M>
PIXELDIFF_DEVICE uint32_t load_pixel(const M& m, const Pixels& x, int rows, int pixels, int row,
                                     int pixel, int channel) {
  return load_pair(m, x.data,
                   at_most(row, rows - 1) * x.stride_row +
                       at_most(pixel, pixels - 1) * x.stride_pixel + channel);
}

}  // namespace pixeldiff::pixel_adaln
