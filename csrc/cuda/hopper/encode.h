// A tensor map as the driver encodes it. The driver's function is an argument: nothing here is
// linked against libcuda, and the tests bring their own.
#pragma once

#include <stdexcept>
#include <string>

#include "tensor_map.h"

namespace pixeldiff::hopper {

// cuTensorMapEncodeTiled, with its enums as the integers they are.
using EncodeTiled = int (*)(void* map, int type, uint32_t rank, void* data, const uint64_t* size,
                            const uint64_t* stride, const uint32_t* box,
                            const uint32_t* element_stride, int interleave, int swizzle,
                            int l2_promotion, int fill);

constexpr int kUint8 = 0, kFloat16 = 6, kBfloat16 = 9;          // CU_TENSOR_MAP_DATA_TYPE_*
constexpr int kSwizzle32 = 1, kSwizzle64 = 2, kSwizzle128 = 3;  // CU_TENSOR_MAP_SWIZZLE_*
constexpr int kPromote256 = 3;  // CU_TENSOR_MAP_L2_PROMOTION_L2_256B

// Writes the 128 bytes of a CUtensorMap. Throws std::invalid_argument where the copy engine cannot
// read `name`, std::runtime_error with the driver's code where it refuses.
inline void encode(EncodeTiled driver, const char* name, const TensorMapSpec& spec, void* map) {
  if (const char* reason = why_not(spec))
    throw std::invalid_argument(std::string(name) + " " + reason);
  const uint32_t every[] = {1, 1, 1, 1};
  const int swizzle = spec.swizzle == 128  ? kSwizzle128
                      : spec.swizzle == 64 ? kSwizzle64
                                           : kSwizzle32;
  const int type = spec.element == 1 ? kUint8 : spec.bf16 ? kBfloat16 : kFloat16;
  const int code = driver(map, type, 4, const_cast<void*>(spec.data), spec.size, spec.stride,
                          spec.box, every, 0, swizzle, kPromote256, 0);
  if (code)
    throw std::runtime_error(std::string("cuTensorMapEncodeTiled of ") + name +
                             " failed with CUDA error " + std::to_string(code));
}

}  // namespace pixeldiff::hopper
