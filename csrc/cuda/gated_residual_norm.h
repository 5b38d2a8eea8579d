#pragma once

#include "../gated_residual_norm.h"

namespace pixeldiff::cuda {

// Enqueues the kernel on `stream` (a cudaStream_t) of `device`. Throws std::runtime_error with
// CUDA's own message when the launch fails.
void gated_residual_norm(const GatedResidualNormArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
