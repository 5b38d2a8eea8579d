// q[n, py*P + px] = weight x[:, Y, X] + bias + [pos_x[X] | pos_y[Y]], one pass from planes of
// colour to the pixels of each patch.
//
// Bytes: B*H*W * (C * sizeof(x) + p * sizeof(q)). FLOPs: B*H*W*p * (2*C + 1). Bandwidth-bound.
//
// fp32 inside, one rounding at the end. Compiled once per instruction set (see simd.h).
#include "pixel_embed.h"

#include "pixel_tile.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

static inline Vec load_any(const PixelEmbedArgs& a, int64_t offset, int64_t n) {
  if (a.x_dtype == DType::f32) return load_n((const float*)a.x + offset, n);
  if (a.x_dtype == DType::bf16) return load_n((const bf16*)a.x + offset, n);
  return load_n((const f16*)a.x + offset, n);
}

// Image rows [begin, end) of the B * H; each is one row of pixels of W / P patches.
template <int C, class T>
static void image_rows(const PixelEmbedArgs& a, int64_t begin, int64_t end) {
  const int64_t p = C ? C : a.p, pixels = a.patch * a.patch;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.H, Y = row % a.H;
    const int64_t first = (b * (a.H / a.patch) + Y / a.patch) * (a.W / a.patch);  // patch at X = 0
    const int64_t x = b * a.stride_b + Y * a.stride_h;
    for (int64_t X = 0; X < a.W;) {
      const int64_t px = X % a.patch, n = min_i64(a.patch - px, Vec::width);
      Tile<C> y;
#pragma GCC unroll 16
      for (int64_t c = 0; c < p; ++c)
        y.at[c] = c < p / 2 ? load_n(a.pos_x_planes + c * a.W + X, n)
                            : Vec::fill(a.pos_y[Y * (p / 2) + c - p / 2]);
#pragma GCC unroll 16
      for (int64_t c = 0; c < p; ++c) y.at[c] = y.at[c] + Vec::fill(a.bias[c]);
      for (int64_t k = 0; k < a.C; ++k) {
        const Vec colour = load_any(a, x + k * a.stride_c + X, n);
#pragma GCC unroll 16
        for (int64_t c = 0; c < p; ++c)
          y.at[c] = Vec::fma(colour, Vec::fill(a.weight[c * a.C + k]), y.at[c]);
      }
      const int64_t token = first + X / a.patch, pixel = Y % a.patch * a.patch + px;
      store_tile(y, n, p, (T*)a.q + (token * pixels + pixel) * p);
      X += n;
    }
  }
}

void pixel_embed_rows(const PixelEmbedArgs& a, int64_t begin, int64_t end) {
  PIXELDIFF_FOR_TILES(image_rows, a.dtype, a.p, a, begin, end)
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
