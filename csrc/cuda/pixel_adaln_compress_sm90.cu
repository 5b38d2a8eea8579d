// z = norm_modulate(q; chunks 0 and 1 of u W^T + b) on sm_90a, in the dtype PIXELDIFF_BF16 chooses.
// The product is pixel_adaln/sm90.h, the rest pixel_adaln/compress.h.
//
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
