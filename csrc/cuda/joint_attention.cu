// What the attention kernels need of the driver and the device, and which of them runs.
#include "joint_attention.h"

#include "attention/launch_mma.h"
#include "check.h"
#ifdef PIXELDIFF_SM90
#include "attention/e4m3_plan.h"
#include "attention/launch_sm90.h"
#endif

namespace pixeldiff::cuda {
namespace {

#ifdef PIXELDIFF_SM90
static_assert(sizeof(CUtensorMap) == 128 && hopper::kFloat16 == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
                  hopper::kBfloat16 == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
                  hopper::kUint8 == CU_TENSOR_MAP_DATA_TYPE_UINT8 &&
                  hopper::kSwizzle32 == CU_TENSOR_MAP_SWIZZLE_32B &&
                  hopper::kSwizzle64 == CU_TENSOR_MAP_SWIZZLE_64B &&
                  hopper::kSwizzle128 == CU_TENSOR_MAP_SWIZZLE_128B &&
                  hopper::kPromote256 == CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
              "the driver's own numbers");

// By name, from the driver that is there: linking against it would need one to import the package.
hopper::EncodeTiled find_encode_tiled() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result), kName);
#else
  check(cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result), kName);
#endif
  if (found == nullptr) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<hopper::EncodeTiled>(found);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "joint_attention");
  return value;
}

hopper::EncodeTiled encode_tiled() {
  static const hopper::EncodeTiled driver = find_encode_tiled();
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
                              attribute(cudaDevAttrMultiProcessorCount, device), static_cast<cudaStream_t>(stream));
}
#endif

}  // namespace pixeldiff::cuda
