// Which block does what: strips of squares, each cut into segments of as many rows.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::local_decoder {

struct Schedule {
  int images, rows, columns;  // of squares
  int strip_columns, segment_rows;

  struct Segment {
    int image, column;  // the first of the strip
    int first, last;    // rows; last is the one past
  };

  PIXELDIFF_HOST_DEVICE constexpr int across() const {
    return (columns + strip_columns - 1) / strip_columns;
  }
  PIXELDIFF_HOST_DEVICE constexpr int strips() const { return images * across(); }
  PIXELDIFF_HOST_DEVICE constexpr int segments() const {
    return (rows + segment_rows - 1) / segment_rows;
  }
  PIXELDIFF_HOST_DEVICE constexpr int blocks() const { return strips() * segments(); }
  // Neighbours run at the same time: whole rows of the image follow each other in memory.
  PIXELDIFF_HOST_DEVICE constexpr Segment segment(int block) const {
    const int strip = block % strips(), first = block / strips() * segment_rows;
    const int last = first + segment_rows < rows ? first + segment_rows : rows;
    return {strip / across(), strip % across() * strip_columns, first, last};
  }
};

// The rows of a segment with which all are done first where `slots` blocks run at once. Each
// segment costs `more` rows than it has.
inline Schedule schedule_of(int images, int rows, int columns, int strip_columns, int slots,
                            int more) {
  Schedule best{images, rows, columns, strip_columns, rows};
  int64_t least = INT64_MAX;
  // Eight rounds leave little of the last one empty; more cuts would only cost the host more.
  const int most = 8 * (slots / best.strips() + 1);
  for (int cuts = 1; cuts <= rows && cuts <= most; ++cuts) {
    const Schedule s{images, rows, columns, strip_columns, (rows + cuts - 1) / cuts};
    const int64_t rounds = (static_cast<int64_t>(s.strips()) * s.segments() + slots - 1) / slots;
    const int64_t time = rounds * (s.segment_rows + more);
    if (time < least) least = time, best = s;
  }
  return best;
}

}  // namespace pixeldiff::local_decoder
