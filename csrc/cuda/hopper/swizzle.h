// Where the copy engine puts a byte of shared memory, and where the tensor cores look for it.
#pragma once

#include "host_device.h"

namespace pixeldiff::hopper {

// Rows of `width` bytes, 32, 64 or 128: the 16-byte pieces of a row change places, in a pattern
// that repeats every 8 * width bytes, so that 8 rows of one piece lie in 8 different groups of
// banks. A function of the address itself: a tile must start at a multiple of 8 * width.
PIXELDIFF_HOST_DEVICE constexpr uint32_t swizzle(uint32_t address, uint32_t width) {
  return address ^ ((address >> 3) & (width - 16));
}

}  // namespace pixeldiff::hopper
