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

}  // namespace pixeldiff::attention
