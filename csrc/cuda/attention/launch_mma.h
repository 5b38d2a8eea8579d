#pragma once

#include <cuda_runtime.h>

#include "../../joint_attention.h"

namespace pixeldiff::attention {

// The kernel for one dtype: each is compiled by itself (joint_attention_mma.cu).
template <bool kBf16>
void launch_mma(const JointAttentionArgs& a, cudaStream_t stream);
template <>
void launch_mma<true>(const JointAttentionArgs&, cudaStream_t);
template <>
void launch_mma<false>(const JointAttentionArgs&, cudaStream_t);

}  // namespace pixeldiff::attention
