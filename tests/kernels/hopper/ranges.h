// What the local decoder's kernels may touch, and how what they refuse comes back through ctypes.
#pragma once

#include <cstring>
#include <exception>
#include <utility>

#include "cuda/local_decoder/pictures.h"

inline auto range(const void* p, int64_t bytes) {
  return std::make_pair(static_cast<const char*>(p), static_cast<const char*>(p) + bytes);
}
// Of a picture whose channels are side by side, 16-bit.
inline auto range(const pixeldiff::cuda::Picture& t, int64_t images, int64_t rows, int64_t columns,
                  int64_t channels) {
  return range(t.data, 2 * ((images - 1) * t.stride_b + (rows - 1) * t.stride_h +
                            (columns - 1) * t.stride_w + channels));
}
inline auto range(const pixeldiff::cuda::Taps& t, int64_t n, int64_t c) {
  return range(t.data, 2 * ((n - 1) * t.stride_n + (c - 1) * t.stride_c + 2 * t.stride_r +
                            2 * t.stride_s + 1));
}

// Runs it on the arguments of a call; 1, and why in `message`, if they or the kernel are wrong.
template <class Call>
int guarded(const Call* c, char* message, int room, void (*run)(const Call&)) {
  try {
    pixeldiff::cuda::check_args(c->args);
    run(*c);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), room - 1);
    return 1;
  }
}
