// cuTensorMapEncodeTiled, by name, from the driver that is there: linking against it would need one
// to import the package.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "../check.h"
#include "encode.h"

namespace pixeldiff::hopper {

static_assert(sizeof(CUtensorMap) == 128 && kFloat16 == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
                  kBfloat16 == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
                  kSwizzle32 == CU_TENSOR_MAP_SWIZZLE_32B &&
                  kSwizzle128 == CU_TENSOR_MAP_SWIZZLE_128B &&
                  kPromote256 == CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
              "the driver's own numbers");

inline EncodeTiled find_encode_tiled() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result), kName);
#else
  check(cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result), kName);
#endif
  if (found == nullptr) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<EncodeTiled>(found);
}

}  // namespace pixeldiff::hopper
