#pragma once

#include "dtype.h"

namespace pixeldiff {

// v[:, Y, X] = weight (rms_norm(q[n, py*P + px]) * norm) + bias
struct PixelHeadArgs {
  int64_t R, H, W, patch, p, C;       // R = B * H/P * W/P patches
  DType dtype;                        // of q
  const void* q;                      // (R, P*P, p) contiguous
  const float *norm, *weight, *bias;  // (p,), (C, p), (C,)
  float* v;                           // (B, C, H, W) contiguous
  float eps;
};

// The head's output v is not stored; the sampler's state x moves from time t to t_next.
struct PixelHeadStepArgs {
  PixelHeadArgs head;
  const float* x;      // (B, C, H, W) contiguous
  const float* noise;  // the same, or null in an ODE and in the last step
  float* x_next;       // (B, C, H, W) contiguous
  float* x0;           // the same, or null when nobody asks
  double t, t_next;
  bool ode, predicts_x0, fp64_state;
};

}  // namespace pixeldiff
