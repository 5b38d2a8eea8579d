// Shared-memory matrix descriptors of wgmma, for 16-bit operands in swizzled panels.
//
// A panel is rows of 32 or 128 bytes, one below the other. PTX ISA, "Asynchronous warpgroup level
// matrix shared memory layout": bits 0-13 start, 16-29 leading and 32-45 stride byte offset, each
// divided by 16; 62-63 the swizzle.
#pragma once

#include "host_device.h"

namespace pixeldiff::hopper {

PIXELDIFF_HOST_DEVICE constexpr uint64_t descriptor(uint32_t start, uint32_t leading,
                                                    uint32_t stride, uint32_t width) {
  const uint64_t mode = width == 128 ? 1 : width == 64 ? 2 : 3;
  return static_cast<uint64_t>((start >> 4) & 0x3fff) |
         static_cast<uint64_t>((leading >> 4) & 0x3fff) << 16 |
         static_cast<uint64_t>((stride >> 4) & 0x3fff) << 32 | mode << 62;
}

// Rows are M or N, the 16 elements of K lie side by side from `start` on. Eight rows are one
// repetition of the swizzle; the leading offset is not read.
PIXELDIFF_HOST_DEVICE constexpr uint64_t k_major(uint32_t start, uint32_t width) {
  return descriptor(start, 16, 8 * width, width);
}

// Rows are K: the elements of N lie side by side, width / 2 of them to a panel, the panels
// `panel_bytes` apart.
PIXELDIFF_HOST_DEVICE constexpr uint64_t n_major(uint32_t start, uint32_t width,
                                                 uint32_t panel_bytes) {
  return descriptor(start, panel_bytes, 8 * width, width);
}

// The same, `bytes` further on: one addition, where a new descriptor would be several instructions.
PIXELDIFF_HOST_DEVICE constexpr uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace pixeldiff::hopper
