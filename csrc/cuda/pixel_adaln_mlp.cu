// Which of the pixel_adaln_mlp kernels runs: each dtype is compiled by itself.
#include "pixel_adaln_mlp.h"

#include "check.h"

namespace pixeldiff::cuda {

template <bool kBf16>
void launch_pixel_adaln_mlp(const PixelAdalnMlpArgs& a, cudaStream_t stream);
template <>
void launch_pixel_adaln_mlp<true>(const PixelAdalnMlpArgs&, cudaStream_t);
template <>
void launch_pixel_adaln_mlp<false>(const PixelAdalnMlpArgs&, cudaStream_t);

void pixel_adaln_mlp(const PixelAdalnMlpArgs& a, int device, void* stream) {
  check_args(a);
  const DeviceScope scope(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::bf16)
    launch_pixel_adaln_mlp<true>(a, on);
  else
    launch_pixel_adaln_mlp<false>(a, on);
}

}  // namespace pixeldiff::cuda
