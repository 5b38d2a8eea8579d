// Where what the local decoder's kernels read lies.
#pragma once

#include <cstdint>

namespace pixeldiff::cuda {

// (images, rows, columns, channels); strides in elements.
struct Picture {
  const void* data;
  int64_t stride_b, stride_h, stride_w;
};

// (out, in, 3, 3) in bf16; strides in elements.
struct Taps {
  const void* data;
  int64_t stride_n, stride_c, stride_r, stride_s;
};

}  // namespace pixeldiff::cuda
