#pragma once

#include "../joint_attention.h"

namespace pixeldiff::cuda {

// Enqueues the sm_90a kernel on `stream` (a cudaStream_t) of `device`. bf16 and fp16, d a multiple
// of 8 up to 128. Throws std::invalid_argument where the copy engine cannot read a tensor,
// std::runtime_error with CUDA's own message when the launch fails.
void joint_attention(const JointAttentionArgs& args, int device, void* stream);

// The same with both products in e4m3; fp32 as well. No mask, no log-sum-exp. Channels and strides
// that are multiples of 16 bytes, fewer than 2^31 rows in all heads of q and of k. `workspace` lies
// at a multiple of 256 bytes.
int64_t joint_attention_fp8_workspace(const JointAttentionArgs& args);  // bytes
void joint_attention_fp8(const JointAttentionArgs& args, void* workspace, int device, void* stream);

}  // namespace pixeldiff::cuda
