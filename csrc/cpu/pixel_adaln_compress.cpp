// z = rms_norm(q) * norm * (1 + scale) + shift for a group of pixels of every patch.
//
// Bytes: (2 + 2) * R*J*p * sizeof(q), q and z and the modulation, which the GEMM before has left in
// the cache. FLOPs: 6 * R*J*p. Bandwidth-bound, and small against the two GEMMs around it, which do
// 2 * R*J*p * (2*D + A).
//
// fp32 inside; z is rounded once, to the storage type its GEMM reads. Compiled once per instruction
// set (see simd.h).

#include "pixel_adaln_compress.h"

#include "pixel_tile.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

template <int C, class T>
static void patches(const PixelAdalnCompressArgs& a, int64_t begin, int64_t end) {
  const PixelGroup& g = a.group;
  const int64_t p = C ? C : g.p, plane = p * g.J;
  for (int64_t r = begin; r < end; ++r) {
    const T* q = (const T*)g.q + r * g.patch_stride;
    const T* shift = (const T*)g.mod + r * 2 * plane;
    T* z = (T*)a.z + r * g.patch_stride;
    for (int64_t j = 0; j < g.J; j += Vec::width) {
      const int64_t n = min_i64(g.J - j, Vec::width);
      Tile<C> x, h;
      load_tile(q + j * p, n, p, x);
      norm_modulate(x, p, g.norm, g.eps, shift + plane + j, shift + j, g.J, n, h);
      store_tile(h, n, p, z + j * p);
    }
  }
}

void pixel_adaln_compress_patches(const PixelAdalnCompressArgs& a, int64_t begin, int64_t end) {
  PIXELDIFF_FOR_TILES(patches, a.group.dtype, a.group.p, a, begin, end)
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
