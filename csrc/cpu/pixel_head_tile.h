// What pixel_head and pixel_head_step share: from a tile of the pixel stream to colours, and where
// they belong in the image.
#pragma once

#include "../pixel_head.h"
#include "pixel_tile.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// Normalises the tile: h = x / rms(x) * norm.
template <int C>
static inline void final_norm(const PixelHeadArgs& a, Tile<C>& x) {
  const int64_t p = C ? C : a.p;
  const Vec inverse = inverse_rms(x, p, a.eps);
#pragma GCC unroll 16
  for (int64_t c = 0; c < p; ++c) x.at[c] = x.at[c] * inverse * Vec::fill(a.norm[c]);
}

// Colour k of every pixel of the tile.
template <int C>
static inline Vec colour(const PixelHeadArgs& a, const Tile<C>& h, int64_t k) {
  const int64_t p = C ? C : a.p;
  const float* weight = a.weight + k * p;
  Vec sum = Vec::fill(a.bias[k]);
#pragma GCC unroll 16
  for (int64_t c = 0; c < p; ++c) sum = Vec::fma(h.at[c], Vec::fill(weight[c]), sum);
  return sum;
}

// Calls each(v, offset, n) for every colour of every run of n pixels of patches [begin, end):
// v holds the colours, `offset` is where the run begins in a (B, C, H, W) image.
template <int C, class T, class Each>
static inline void for_colours(const PixelHeadArgs& a, int64_t begin, int64_t end,
                               const Each& each) {
  const int64_t p = C ? C : a.p, columns = a.W / a.patch, per_image = a.H / a.patch * columns;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / per_image, top = r % per_image / columns * a.patch;
    const int64_t left = r % columns * a.patch;
    const T* q = (const T*)a.q + r * a.patch * a.patch * p;
    for (int64_t py = 0; py < a.patch; ++py) {
      for (int64_t px = 0; px < a.patch; px += Vec::width) {
        const int64_t n = min_i64(a.patch - px, Vec::width);
        Tile<C> h;
        load_tile(q + (py * a.patch + px) * p, n, p, h);
        final_norm(a, h);
        for (int64_t k = 0; k < a.C; ++k) {
          const int64_t offset = ((b * a.C + k) * a.H + top + py) * a.W + left + px;
          each(colour(a, h, k), offset, n);
        }
      }
    }
  }
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
