#pragma once

#include "dtype.h"

namespace pixeldiff {

// y = a * sigmoid(a) * b
struct SwigluArgs {
  int64_t B, N, D;
  DType dtype;  // of a, b and y
  Rows a;       // (B, N, D)
  Rows b;       // (B, N, D)
  void* y;      // (B, N, D) contiguous
};

}  // namespace pixeldiff
