// z = norm_modulate(q; chunks 0 and 1 of u W^T + b) on sm_90a, in the dtype PIXELDIFF_BF16 chooses.
// The product is pixel_adaln/sm90.h, the rest pixel_adaln/compress.h.
//
// FLOPs: 2*R*P*P*16*2*D; bytes: q read, z written. PiD at 2048 (16384 patches of 256 pixels, D
// 1536): 0.41 TFLOP, 0.52 ms at 798 TFLOP/s; 0.27 GB, 0.09 ms at 3.0 TB/s. The tokens are the
// vendor's product of z, 0.15 TFLOP, 0.22 ms at 700 TFLOP/s. Both of a step's blocks: 1.4 of 77 ms.
//
// Counted for a tile of 128 x 256 and D 1536, in clocks of a multiprocessor: tensor cores 24576;
// shared memory 25400, 80 + 48 KB a step and the epilogue's ways through the first-level cache;
// issue slots 5200, of which 1400 are the epilogue. From the second-level cache 590 KB and z, 2.7
// GB a call, 0.42 ms at 6.4 TB/s. 32 tiles for each of the 128 multiprocessors that clusters of
// four fill: tensor cores 0.53 ms at the measured rate, shared memory 0.46. Predicted 0.6 ms, and
// with the vendor's product 0.8: 87 % of the floor. Not yet measured. docs/kernels/estimates.md
// compares it with the Triton kernel and says what else was weighed.
#include "pixel_adaln/launch.cuh"

namespace pixeldiff::pixel_adaln {
namespace {

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    pixel_adaln_compress_sm90_kernel(const __grid_constant__ Schedule schedule,
                                     const __grid_constant__ Compress<kBf16> compress,
                                     const __grid_constant__ CUtensorMap patches,
                                     const __grid_constant__ CUtensorMap weights) {
  run_product<kBf16>(schedule, compress, patches, weights);
}

}  // namespace
}  // namespace pixeldiff::pixel_adaln

namespace pixeldiff::cuda {

template <bool kBf16>
void launch_pixel_adaln_compress(const PixelAdalnCompressArgs& a, cudaStream_t stream);

template <>
void launch_pixel_adaln_compress<PIXELDIFF_BF16>(const PixelAdalnCompressArgs& a,
                                                 cudaStream_t stream) {
  pixel_adaln::launch("pixel_adaln_compress",
                      pixel_adaln::pixel_adaln_compress_sm90_kernel<PIXELDIFF_BF16>, a,
                      pixel_adaln::compress_of<PIXELDIFF_BF16>(a), stream);
}

}  // namespace pixeldiff::cuda
