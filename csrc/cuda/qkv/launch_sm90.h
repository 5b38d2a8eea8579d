#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "../../qkv_norm_rope.h"
#include "../hopper/encode.h"

namespace pixeldiff::qkv {

// The kernel for one dtype: each is compiled by itself (qkv_norm_rope_sm90.cu).
template <bool kBf16>
void launch_sm90(const QkvNormRopeArgs& a, hopper::EncodeTiled driver, int multiprocessors,
                 cudaStream_t stream);
template <>
void launch_sm90<true>(const QkvNormRopeArgs&, hopper::EncodeTiled, int, cudaStream_t);
template <>
void launch_sm90<false>(const QkvNormRopeArgs&, hopper::EncodeTiled, int, cudaStream_t);

}  // namespace pixeldiff::qkv
