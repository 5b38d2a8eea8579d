// Stages of shared memory that one side fills and the other empties, with two barriers each.
#pragma once

#include "host_device.h"

namespace pixeldiff::hopper {

// The n-th use of a ring. A barrier's phases alternate between parity 0 and 1, and a wait for a
// parity ends when the phase of that parity is over: the reader of use n waits for `full` with
// `parity()`; the writer waits for `empty` with the other one, which before the first phase is
// over.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t round = 0;

  PIXELDIFF_HOST_DEVICE constexpr uint32_t parity() const { return round & 1; }
  PIXELDIFF_HOST_DEVICE constexpr uint32_t parity_of_writer() const { return parity() ^ 1; }
  PIXELDIFF_HOST_DEVICE constexpr void advance() {
    if (++stage == kStages) {
      stage = 0;
      ++round;
    }
  }
};

}  // namespace pixeldiff::hopper
