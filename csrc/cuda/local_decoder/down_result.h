// Which values of the result a lane of local_decoder_down has, and from which columns of a product.
#pragma once

#include "packed.h"
#include "products.h"

namespace pixeldiff::local_decoder {

template <int channels>
struct DownResult;

// 16 columns, in the order of products.h: four channels of either pixel of a square.
template <>
struct DownResult<kOut> {
  static constexpr int kWords = 4;     // of B, a lane's
  static constexpr int kChannels = 4;  // a lane's
  PIXELDIFF_HOST_DEVICE static constexpr int weight_channel(int lane, int word) {
    return fragment_channel(lane, word);
  }
  PIXELDIFF_HOST_DEVICE static constexpr int channel(int lane, int i) { return lane % 4 * 4 + i; }
  // Which of them an accumulator is of.
  PIXELDIFF_HOST_DEVICE static constexpr int sum_channel(int i) { return accumulator_channel(i); }
  PIXELDIFF_HOST_DEVICE static constexpr bool has_values(int) { return true; }
  // Bytes: this lane's first ones among those of two pixels in a row, and of a square.
  PIXELDIFF_HOST_DEVICE static constexpr int skip_at(int lane) { return lane % 4 * 8; }
  PIXELDIFF_HOST_DEVICE static constexpr int pooled_at(int lane) { return lane % 4 * 8; }
};

// 8 columns, of which the first six are the values of a square in the order in which they lie, two
// to a lane: of the product of left pixels three of them count, of that of right ones the others.
// The fourth lane has none.
template <>
struct DownResult<kPackedChannels> {
  static constexpr int kWords = 2;
  static constexpr int kChannels = 2;
  PIXELDIFF_HOST_DEVICE static constexpr int weight_channel(int lane, int) { return lane / 4 % 3; }
  PIXELDIFF_HOST_DEVICE static constexpr int channel(int lane, int i) {
    return (lane % 4 * 2 + i) % 3;
  }
  PIXELDIFF_HOST_DEVICE static constexpr int sum_channel(int i) { return i % 2; }
  PIXELDIFF_HOST_DEVICE static constexpr bool has_values(int lane) { return lane % 4 < 3; }
  PIXELDIFF_HOST_DEVICE static constexpr bool is_left(int lane, int i) {
    return lane % 4 * 2 + i < 3;
  }
  // Its second value and this lane's first are of one channel, left and right or right and left.
  PIXELDIFF_HOST_DEVICE static constexpr int partner(int lane) {
    return lane / 4 * 4 + (lane + 1) % 4 % 3;
  }
  PIXELDIFF_HOST_DEVICE static constexpr int skip_at(int lane) { return lane % 4 * 4; }
  PIXELDIFF_HOST_DEVICE static constexpr int pooled_at(int lane) { return channel(lane, 0) * 2; }
};

}  // namespace pixeldiff::local_decoder
