// q += gate1 * a, then q += gate2 * mlp(norm_modulate(q)) on sm_90a: chunks 2 to 5 of u W^T + b, in
// the dtype PIXELDIFF_BF16 chooses. The product is pixel_adaln/sm90.h, the rest pixel_adaln/mlp.h.
//
// FLOPs: 2*R*P*P*16*(4*D + 2*F); bytes: q and a read, q written. PiD at 2048 (16384 patches of 256
// pixels, D 1536, F 64): 0.82 + 0.02 TFLOP, 1.06 ms at 798 TFLOP/s; 0.40 GB, 0.13 ms at 3.0 TB/s. a
// is the vendor's product, 0.15 TFLOP, 0.22 ms at 700 TFLOP/s. Both of a step's blocks: 2.5 of 77
// ms.
//
// Counted for a tile of 128 x 128 and D 1536, in clocks of a multiprocessor: tensor cores 12288
// (and 512 for the MLP); shared memory 15400, 48 + 32 KB a step; issue slots 5700, under which fall
// all of the epilogue's, with the other warpgroup's product. From the second-level cache 393 KB,
// 6.4 GB a call, 1.0 ms at 6.4 TB/s. Shared memory is the longest: 1.2 ms on the 128
// multiprocessors that clusters of four fill. Predicted 1.3 ms, and with the vendor's product 1.5:
// 82 % of the floor. Not yet measured. docs/kernels/estimates.md compares it with the Triton kernel
// and says what else was weighed.
#include "pixel_adaln/launch.cuh"

namespace pixeldiff::pixel_adaln {
namespace {

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    pixel_adaln_mlp_sm90_kernel(const __grid_constant__ Schedule schedule,
                                const __grid_constant__ Mlp<kBf16> mlp,
                                const __grid_constant__ CUtensorMap patches,
                                const __grid_constant__ CUtensorMap weights) {
  run_product<kBf16>(schedule, mlp, patches, weights);
}

}  // namespace
}  // namespace pixeldiff::pixel_adaln

namespace pixeldiff::cuda {

template <bool kBf16>
void launch_pixel_adaln_mlp(const PixelAdalnMlpArgs& a, cudaStream_t stream);

template <>
void launch_pixel_adaln_mlp<PIXELDIFF_BF16>(const PixelAdalnMlpArgs& a, cudaStream_t stream) {
  pixel_adaln::launch("pixel_adaln_mlp", pixel_adaln::pixel_adaln_mlp_sm90_kernel<PIXELDIFF_BF16>,
                      a, pixel_adaln::mlp_of<PIXELDIFF_BF16>(a), stream);
}

}  // namespace pixeldiff::cuda
