// What the attention kernels need of the driver and the device, and which of them runs.
#include "joint_attention.h"

#include "attention/launch_sm90.h"
#include "check.h"
#include "hopper/find_encode_tiled.h"

namespace pixeldiff::cuda {

void joint_attention(const JointAttentionArgs& a, int device, void* stream) {
  const DeviceScope scope(device);
  static const hopper::EncodeTiled driver = hopper::find_encode_tiled();
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "joint_attention");
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::bf16)
    attention::launch_sm90<true>(a, driver, multiprocessors, on);
  else
    attention::launch_sm90<false>(a, driver, multiprocessors, on);
}

}  // namespace pixeldiff::cuda
