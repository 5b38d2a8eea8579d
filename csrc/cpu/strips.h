#pragma once

#include <cstdint>

namespace pixeldiff::cpu {

// Columns of an image of `width` pixels, an even number, in as few strips of at most `most` as
// there can be: `pixels` each, even and as equal as that allows, since the threads share out strips
// as if all were alike. Internal linkage: every instruction set compiles its own.
struct Strips {
  int64_t across, pixels;
};

static inline Strips strips_of(int64_t width, int64_t most) {
  const int64_t across = (width + most - 1) / most;
  return {across, (width / 2 + across - 1) / across * 2};
}

}  // namespace pixeldiff::cpu
