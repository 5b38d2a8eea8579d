// The kernel's parameters, from the arguments of the op.
#pragma once

#include "../../qkv_norm_rope.h"
#include "sm90.h"

namespace pixeldiff::qkv {

template <class Columns>
Sm90Params params(const QkvNormRopeArgs& a) {
  const auto count = [](int64_t n) { return static_cast<int>(n); };
  const auto stream = [](const QkvStream& s, int first) {
    return Sm90Stream{first,
                      static_cast<const char*>(s.q_weight),
                      static_cast<const char*>(s.k_weight),
                      s.cos,
                      s.sin,
                      s.cos_stride,
                      s.sin_stride};
  };
  const int column_tiles = count((3 * a.G + Columns::kHeads - 1) / Columns::kHeads);
  const int text = count(a.text.rows), image = count(a.image.rows);
  return {{count(a.B), {image, text}, column_tiles},
          {stream(a.image, text), stream(a.text, 0)},
          count(a.K),
          count(a.G),
          text + image,
          static_cast<char*>(a.out),
          a.eps};
}

}  // namespace pixeldiff::qkv
