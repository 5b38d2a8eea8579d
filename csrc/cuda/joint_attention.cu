// What the attention kernels need of the driver and the device, and which of them runs.
#include "joint_attention.h"

#include "attention/launch_mma.h"
#include "check.h"
#ifdef PIXELDIFF_SM90
#include "attention/e4m3_plan.h"
#include "attention/launch_sm90.h"
#include "hopper/find_encode_tiled.h"
#endif

namespace pixeldiff::cuda {
namespace {

#ifdef PIXELDIFF_SM90
int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "joint_attention");
  return value;
}

hopper::EncodeTiled encode_tiled() {
  static const hopper::EncodeTiled driver = hopper::find_encode_tiled();
  return driver;
}

void launch_sm90(const JointAttentionArgs& a, int device, cudaStream_t stream) {
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  if (a.dtype == DType::bf16)
    attention::launch_sm90<true>(a, encode_tiled(), multiprocessors, stream);
  else
    attention::launch_sm90<false>(a, encode_tiled(), multiprocessors, stream);
}
// Its instructions are those of 9.0 alone.
bool runs_sm90(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}
#else
void launch_sm90(const JointAttentionArgs&, int, cudaStream_t) {
  throw std::invalid_argument("built without sm_90a");
}
bool runs_sm90(int) { return false; }
#endif

void launch_mma(const JointAttentionArgs& a, cudaStream_t stream) {
  if (a.dtype == DType::bf16)
    attention::launch_mma<true>(a, stream);
  else
    attention::launch_mma<false>(a, stream);
}

}  // namespace

void joint_attention(const JointAttentionArgs& a, AttentionKernel kernel, int device,
                     void* stream) {
  const DeviceScope scope(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (kernel == AttentionKernel::best)
    kernel = runs_sm90(device) ? AttentionKernel::sm90 : AttentionKernel::mma;
  if (kernel == AttentionKernel::sm90)
    launch_sm90(a, device, on);
  else
    launch_mma(a, on);
}

#ifdef PIXELDIFF_SM90
int64_t joint_attention_fp8_workspace(const JointAttentionArgs& a) {
  return attention::plan_e4m3(a, nullptr).bytes;
}

void joint_attention_fp8(const JointAttentionArgs& a, void* workspace, int device, void* stream) {
  const DeviceScope scope(device);
  attention::launch_e4m3_sm90(a, static_cast<char*>(workspace), encode_tiled(),
                              attribute(cudaDevAttrMultiProcessorCount, device),
                              static_cast<cudaStream_t>(stream));
}
#endif

}  // namespace pixeldiff::cuda
