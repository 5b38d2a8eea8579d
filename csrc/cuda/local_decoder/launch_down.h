// What the kernel of local_decoder_down is told.
#pragma once

#include "down.h"

namespace pixeldiff::local_decoder {

// `slots`: blocks that run at once.
inline DownParams down_params(const cuda::LocalDecoderDownArgs& a, int strip_columns, int slots) {
  const auto count = [](int64_t n) { return static_cast<int>(n); };
  // A step before the first row.
  return {schedule_of(count(a.B), count(a.rows), count(a.columns), strip_columns, slots, 1),
          a.x,
          a.x_plane,
          a.weight,
          static_cast<const char*>(a.bias),
          static_cast<char*>(a.skip),
          static_cast<char*>(a.pooled)};
}

}  // namespace pixeldiff::local_decoder
