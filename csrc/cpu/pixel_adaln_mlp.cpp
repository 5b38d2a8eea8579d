// For a group of pixels of every patch:
//   q <- q + gate1 * attn;  q <- q + gate2 * fc2 gelu(fc1 (rms_norm(q) * norm * (1 + scale) +
//   shift))
//
// Bytes: 2 * R*J*p * sizeof(q) from memory, and 5 * R*J*p * sizeof(q) of modulation and expanded
// attention, which the GEMMs before have left in the cache. FLOPs: R*J * (4*F*p + 25*F + 12*p), F =
// hidden; at p = 16, F = 64 that is 6 kFLOP for 64 bytes of bf16: compute-bound, F GELUs of 25
// instructions being two fifths of it. The GEMMs do 2 * R*J*p * (4*D + A), 200 times as much at the
// released widths.
//
// All of it is fp32; what is rounded to the storage type is what the GEMMs read and write
// (attention, modulation) and the result, once. Compiled once per instruction set (see simd.h).
#include "pixel_adaln_mlp.h"

#include "gelu.h"
#include "pixel_tile.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// y = fc2 gelu(fc1 h); lanes are pixels, so every weight is one broadcast. fc2 is summed in two
// halves: adding the hidden units one by one to a single sum rounds once for each of them.
template <int C>
static inline void pixel_mlp(const PixelAdalnMlpArgs& a, const Tile<C>& h, Tile<C>& y) {
  const int64_t p = C ? C : a.group.p;
  Tile<C> sum;
#pragma GCC unroll 16
  for (int64_t c = 0; c < p; ++c) {
    sum.at[c] = Vec::fill(a.fc2_bias[c]);
    y.at[c] = Vec::zero();
  }
  for (int64_t f = 0; f < a.hidden; ++f) {
    if (f == a.hidden / 2) {
#pragma GCC unroll 16
      for (int64_t c = 0; c < p; ++c) {
        sum.at[c] = sum.at[c] + y.at[c];
        y.at[c] = Vec::zero();
      }
    }
    const float* into = a.fc1_weight + f * p;
    const float* out_of = a.fc2_columns + f * p;
    Vec even = Vec::fill(a.fc1_bias[f]), odd = Vec::zero();
#pragma GCC unroll 8
    for (int64_t c = 0; c < p; c += 2) {
      even = Vec::fma(h.at[c], Vec::fill(into[c]), even);
      odd = Vec::fma(h.at[c + 1], Vec::fill(into[c + 1]), odd);
    }
    const Vec active = gelu(even + odd);
#pragma GCC unroll 16
    for (int64_t c = 0; c < p; ++c) y.at[c] = Vec::fma(active, Vec::fill(out_of[c]), y.at[c]);
  }
#pragma GCC unroll 16
  for (int64_t c = 0; c < p; ++c) y.at[c] = sum.at[c] + y.at[c];
}

template <int C, class T>
static void patches(const PixelAdalnMlpArgs& a, int64_t begin, int64_t end) {
  const PixelGroup& g = a.group;
  const int64_t p = C ? C : g.p, plane = p * g.J;
  for (int64_t r = begin; r < end; ++r) {
    const T* q = (const T*)g.q + r * g.patch_stride;
    const T* attn = (const T*)a.attn + r * plane;
    const T* mod = (const T*)g.mod + r * 4 * plane;
    T* out = (T*)a.out + r * g.patch_stride;
    for (int64_t j = 0; j < g.J; j += Vec::width) {
      const int64_t n = min_i64(g.J - j, Vec::width);
      const T *gate1 = mod + j, *shift = gate1 + plane, *scale = shift + plane;
      const T* gate2 = scale + plane;
      Tile<C> x, h, y;
      load_tile(q + j * p, n, p, x);
      load_tile(attn + j * p, n, p, y);
#pragma GCC unroll 16
      for (int64_t c = 0; c < p; ++c)
        x.at[c] = Vec::fma(load_n(gate1 + c * g.J, n), y.at[c], x.at[c]);
      norm_modulate(x, p, g.norm, g.eps, scale, shift, g.J, n, h);
      pixel_mlp(a, h, y);
#pragma GCC unroll 16
      for (int64_t c = 0; c < p; ++c)
        x.at[c] = Vec::fma(load_n(gate2 + c * g.J, n), y.at[c], x.at[c]);
      store_tile(x, n, p, out + j * p);
    }
  }
}

void pixel_adaln_mlp_patches(const PixelAdalnMlpArgs& a, int64_t begin, int64_t end) {
  PIXELDIFF_FOR_TILES(patches, a.group.dtype, a.group.p, a, begin, end)
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
