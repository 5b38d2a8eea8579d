#pragma once

#include "../joint_attention.h"

namespace pixeldiff::cuda {

// Enqueues the sm_90a kernel on `stream` (a cudaStream_t) of `device`. bf16 and fp16, d a multiple
// of 8 up to 128. Throws std::invalid_argument where the copy engine cannot read a tensor,
// std::runtime_error with CUDA's own message when the launch fails.
void joint_attention(const JointAttentionArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
