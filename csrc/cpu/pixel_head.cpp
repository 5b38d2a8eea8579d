// v[:, Y, X] = weight (rms_norm(q[n, py*P + px]) * norm) + bias, one pass from the pixels of each
// patch to planes of colour.
//
// Bytes: B*H*W * (p * sizeof(q) + 4 * C). FLOPs: B*H*W * p * (2*C + 4). Bandwidth-bound.
//
// fp32 inside and out: nothing is rounded to the storage type of q. Compiled once per instruction
// set (see simd.h).
#include "pixel_head.h"

#include "pixel_head_tile.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

template <int C, class T>
static void patches(const PixelHeadArgs& a, int64_t begin, int64_t end) {
  for_colours<C, T>(a, begin, end,
                    [&](Vec v, int64_t offset, int64_t n) { store_n(v, a.v + offset, n); });
}

void pixel_head_patches(const PixelHeadArgs& a, int64_t begin, int64_t end) {
  PIXELDIFF_FOR_TILES(patches, a.dtype, a.p, a, begin, end)
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
