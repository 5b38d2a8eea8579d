#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "../../joint_attention.h"
#include "../hopper/encode.h"

namespace pixeldiff::attention {

// The kernel for one dtype: each is compiled by itself (joint_attention_sm90.cu).
template <bool kBf16>
void launch_sm90(const JointAttentionArgs& a, hopper::EncodeTiled driver, int multiprocessors,
                 cudaStream_t stream);
template <>
void launch_sm90<true>(const JointAttentionArgs&, hopper::EncodeTiled, int, cudaStream_t);
template <>
void launch_sm90<false>(const JointAttentionArgs&, hopper::EncodeTiled, int, cudaStream_t);

// Quantises into the workspace and attends (joint_attention_fp8_sm90.cu).
void launch_e4m3_sm90(const JointAttentionArgs& a, char* workspace, hopper::EncodeTiled driver,
                      int multiprocessors, cudaStream_t stream);

}  // namespace pixeldiff::attention
