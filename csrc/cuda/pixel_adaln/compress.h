// From the chunks of pixel_adaln_compress to its modulated pixels, in registers.
//
// A thread has two rows of a tile of 64 patches by 8 pixels, and of each an octet of channels of
// four pixels: what it reads and writes is 16 bytes, and a pixel's other octet is in the next lane.
#pragma once

#include <cmath>

#include "pixels.h"
#include "schedule.h"
#include "sm90_tile.h"

namespace pixeldiff::pixel_adaln {

template <bool kBf16>
struct Compress {
  using Tile = Sm90Tile<OctetColumns<0, 2, 256, 4>, 1>;
  enum Chunk { kShift, kScale };

  int rows, pixels;
  Pixels q;                 // strides are multiples of 8
  const void* ada_bias;     // (6*16*pixels,)
  const void* norm_weight;  // (16,)
  void* out;                // (rows, pixels, 16) contiguous
  float eps;

  // Asked for before the product, which hides the way to memory.
  struct Given {
    uint32_t q[Tile::kTwos][2][4];     // of both rows
    uint32_t bias[Tile::kTwos][2][4];  // of both chunks
    uint32_t norm[4];
  };

  template <class M>
  PIXELDIFF_DEVICE Given load(const M& m, const Schedule::Tile& at) const {
    const int lane = m.thread() % 32, channel = Tile::channel(lane);
    Given given;
    PIXELDIFF_UNROLL
    for (int two = 0; two < Tile::kTwos; ++two) {
      const int pixel = at_most(at.pixel + Tile::pixel(lane, two), pixels - 1);
      PIXELDIFF_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = at_most(Place::of(m, at.row).row(0, i), rows - 1);
        load_octet(m, q.data, row * q.stride_row + pixel * q.stride_pixel + channel,
                   given.q[two][i]);
        load_octet(m, ada_bias, Tile::weight_row(pixel, i) + channel, given.bias[two][i]);
      }
    }
    load_octet(m, norm_weight, channel, given.norm);
    return given;
  }

  template <class M>
  PIXELDIFF_DEVICE void store(M& m, const Schedule::Tile& at, const Given& given,
                              const float (&sums)[1][Tile::kColumns / 2]) const {
    const int lane = m.thread() % 32;
    PIXELDIFF_UNROLL
    for (int two = 0; two < Tile::kTwos; ++two) {
      const int pixel = at.pixel + Tile::pixel(lane, two);
      PIXELDIFF_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = Place::of(m, at.row).row(0, r);
        uint32_t z[4];
        modulate(m, given, two, r, sums[0], z);
        const int64_t to = (static_cast<int64_t>(row) * pixels + pixel) * kChannels;
        if (row < rows && pixel < pixels)
          m.template store_words<4>(static_cast<char*>(out) + 2 * (to + Tile::channel(lane)), z);
      }
    }
  }

 private:
  // Of one pixel of a row, the lane's octet.
  template <class M>
  PIXELDIFF_DEVICE void modulate(M& m, const Given& given, int two, int r,
                                 const float (&sums)[Tile::kColumns / 2], uint32_t (&z)[4]) const {
    float values[4][2], squares = 0.0f;
    PIXELDIFF_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      m.template unpack<kBf16>(given.q[two][r][pair], values[pair][0], values[pair][1]);
      squares = fmaf(values[pair][0], values[pair][0], squares);
      squares = fmaf(values[pair][1], values[pair][1], squares);
    }
    squares += m.shuffle_xor(squares, 1);
    const float inverse = m.rsqrt(fmaf(squares, 1.0f / kChannels, eps));
    PIXELDIFF_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      float norm[2], shift[2], scale[2], result[2];
      m.template unpack<kBf16>(given.norm[pair], norm[0], norm[1]);
      m.template unpack<kBf16>(given.bias[two][kShift][pair], shift[0], shift[1]);
      m.template unpack<kBf16>(given.bias[two][kScale][pair], scale[0], scale[1]);
      PIXELDIFF_UNROLL
      for (int side = 0; side < 2; ++side) {
        const float one = 1.0f + scale[side];  // the same for both rows
        const float s = sums[Tile::value(two, kScale, pair, r, side)] + one;
        const float t = sums[Tile::value(two, kShift, pair, r, side)] + shift[side];
        result[side] = fmaf(values[pair][side] * inverse, norm[side] * s, t);
      }
      z[pair] = m.template pack<kBf16>(result[0], result[1]);
    }
  }
};

}  // namespace pixeldiff::pixel_adaln
