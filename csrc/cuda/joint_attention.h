#pragma once

#include "../joint_attention.h"

namespace pixeldiff::cuda {

// Which kernel runs: of `best` the device's own.
enum class AttentionKernel : int { best = 0, sm90 = 1, mma = 2 };

// Enqueues a kernel on `stream` (a cudaStream_t) of `device`: joint_attention_sm90.cu on 9.0 where
// it was built, else joint_attention_mma.cu, which every device from 8.0 on runs. bf16 and fp16, d
// a multiple of 8 up to 128. Throws std::invalid_argument where a tensor is not aligned to 16 bytes
// as hopper/tensor_map.h says or this build has no such kernel, std::runtime_error with CUDA's own
// message when the launch fails.
void joint_attention(const JointAttentionArgs& args, AttentionKernel kernel, int device,
                     void* stream);

// The same with both products in e4m3; fp32 as well. No mask, no log-sum-exp. Channels and strides
// that are multiples of 16 bytes, fewer than 2^31 rows in all heads of q and of k. `workspace` lies
// at a multiple of 256 bytes.
int64_t joint_attention_fp8_workspace(const JointAttentionArgs& args);  // bytes
void joint_attention_fp8(const JointAttentionArgs& args, void* workspace, int device, void* stream);

}  // namespace pixeldiff::cuda
