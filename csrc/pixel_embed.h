#pragma once

#include "dtype.h"

namespace pixeldiff {

// q[n, py*P + px] = weight x[:, Y, X] + bias + [pos_x[X] | pos_y[Y]] for pixel (py, px) of patch n
struct PixelEmbedArgs {
  int64_t B, C, H, W;
  int64_t patch, p;  // P pixels a side, p channels a pixel
  DType x_dtype;
  const void* x;                         // (B, C, H, W), last axis contiguous
  int64_t stride_b, stride_c, stride_h;  // of x, in elements
  const float *weight, *bias;            // (p, C), (p,)
  const float *pos_x_planes, *pos_y;     // (p/2, W), (H, p/2)
  DType dtype;                           // of q
  void* q;                               // (B*N, P*P, p) contiguous
};

}  // namespace pixeldiff
