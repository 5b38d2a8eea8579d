// Which of the pixel_adaln_compress kernels runs: each dtype is compiled by itself.
#include "pixel_adaln_compress.h"

#include "check.h"

namespace pixeldiff::cuda {

template <bool kBf16>
void launch_pixel_adaln_compress(const PixelAdalnCompressArgs& a, cudaStream_t stream);
template <>
void launch_pixel_adaln_compress<true>(const PixelAdalnCompressArgs&, cudaStream_t);
template <>
void launch_pixel_adaln_compress<false>(const PixelAdalnCompressArgs&, cudaStream_t);

void pixel_adaln_compress(const PixelAdalnCompressArgs& a, int device, void* stream) {
  check_args(a);
  const DeviceScope scope(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::bf16)
    launch_pixel_adaln_compress<true>(a, on);
  else
    launch_pixel_adaln_compress<false>(a, on);
}

}  // namespace pixeldiff::cuda
