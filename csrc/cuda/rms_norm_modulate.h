#pragma once

#include "../rms_norm_modulate.h"

namespace pixeldiff::cuda {

// Enqueues the kernel on `stream` (a cudaStream_t) of `device`. Throws std::runtime_error with
// CUDA's own message when the launch fails.
void rms_norm_modulate(const RmsNormModulateArgs& args, int device, void* stream);

}  // namespace pixeldiff::cuda
