// What the kernels of local_decoder_up are told.
#pragma once

#include "up.h"
#include "up_compose.h"

namespace pixeldiff::local_decoder {

inline ComposeParams compose_params(const cuda::LocalDecoderUpArgs& a) {
  return {static_cast<int>(a.Ci),
          static_cast<int>(a.Cu),
          static_cast<int>(a.Cs),
          a.up_weight,
          a.weight,
          static_cast<const char*>(a.up_bias),
          static_cast<const char*>(a.bias),
          weights_of(a.Ci, a.Cs),
          static_cast<char*>(a.workspace)};
}

// `slots`: blocks that run at once.
inline UpParams up_params(const cuda::LocalDecoderUpArgs& a, int strip_columns, int slots) {
  const auto count = [](int64_t n) { return static_cast<int>(n); };
  // A step before the first row, and one behind the last.
  return {schedule_of(count(a.B), count(a.rows), count(a.columns), strip_columns, slots, 2),
          count(a.S),
          count(a.Ci / 8),
          count(a.Cs / 8),
          a.x,
          a.skip,
          weights_of(a.Ci, a.Cs),
          static_cast<const char*>(a.workspace),
          static_cast<char*>(a.out)};
}

}  // namespace pixeldiff::local_decoder
