#pragma once

#include "../qkv_norm_rope.h"

namespace pixeldiff::cuda {

// Enqueues the sm_90a kernel on `stream` (a cudaStream_t) of `device`. bf16 and fp16, d 64, 72 or
// 128. Throws std::invalid_argument where the copy engine cannot read a tensor, std::runtime_error
// with CUDA's own message when the launch fails.
void qkv_norm_rope(const QkvNormRopeArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
