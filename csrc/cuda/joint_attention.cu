// What the attention kernels need of the driver and the device, and which of them runs.
#include "joint_attention.h"

#include "attention/e4m3_plan.h"
#include "attention/launch_sm90.h"
#include "check.h"

namespace pixeldiff::cuda {
namespace {

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

hopper::EncodeTiled encode_tiled() {
  static const hopper::EncodeTiled driver = find_encode_tiled();
  return driver;
}

int multiprocessors_of(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "joint_attention");
  return count;
}

}  // namespace

void joint_attention(const JointAttentionArgs& a, int device, void* stream) {
  const DeviceScope scope(device);
  const hopper::EncodeTiled driver = encode_tiled();
  const int multiprocessors = multiprocessors_of(device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::bf16)
    attention::launch_sm90<true>(a, driver, multiprocessors, on);
  else
    attention::launch_sm90<false>(a, driver, multiprocessors, on);
}

int64_t joint_attention_fp8_workspace(const JointAttentionArgs& a) {
  return attention::plan_e4m3(a, nullptr).bytes;
}

void joint_attention_fp8(const JointAttentionArgs& a, void* workspace, int device, void* stream) {
  const DeviceScope scope(device);
  attention::launch_e4m3_sm90(a, static_cast<char*>(workspace), encode_tiled(),
                              multiprocessors_of(device), static_cast<cudaStream_t>(stream));
}

}  // namespace pixeldiff::cuda
