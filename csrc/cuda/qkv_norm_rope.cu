// What the projection kernels need of the driver and the device, and which of them runs.
#include "qkv_norm_rope.h"

#include "check.h"
#include "hopper/find_encode_tiled.h"
#include "qkv/launch_sm90.h"

namespace pixeldiff::cuda {

void qkv_norm_rope(const QkvNormRopeArgs& a, int device, void* stream) {
  const DeviceScope scope(device);
  static const hopper::EncodeTiled driver = hopper::find_encode_tiled();
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "qkv_norm_rope");
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::bf16)
    qkv::launch_sm90<true>(a, driver, multiprocessors, on);
  else
    qkv::launch_sm90<false>(a, driver, multiprocessors, on);
}

}  // namespace pixeldiff::cuda
