// Which channels the columns of a product are, and what the copy engine lays there.
//
// Columns are rows of the weight, and the order in which they lie in shared memory is free. A pixel
// has 96 of them, 12 octets, two for each chunk; a tile has `used` chunks of each of its pixels,
// from `first` on. In an accumulator a thread holds two neighbours of every 8 columns
// (hopper/fragment.h). A box is some rows of some octets of some neighbouring pixels, in that order
// from the inside.
#pragma once

#include "../hopper/fragment.h"
#include "../hopper/host_device.h"

namespace pixeldiff::pixel_adaln {

constexpr int kChannels = 16;  // of a pixel
constexpr int kChunks = 6;     // of the projection, and 16 channels each
constexpr int kOctets = kChunks * kChannels / 8;

struct WeightBox {
  int row, octet;  // the first
};

// As they lie: pixel after pixel, and a chunk of it after the other. A thread has two channels of
// each octet, which is what mma.sync wants of an operand.
template <int first, int used, int columns>
struct PairColumns {
  static constexpr int kColumns = columns;
  static constexpr int kPixelColumns = used * kChannels;
  static constexpr int kPixels = kColumns / kPixelColumns;

  static constexpr int kBoxes = 1;
  static constexpr int kBoxOctetRows = 8, kBoxOctets = 2 * used;
  PIXELDIFF_HOST_DEVICE static constexpr WeightBox box(int) { return {0, 2 * first}; }

  // Register of a product's accumulator that holds channel 8 * half + 2 * (lane % 4) + side of a
  // chunk (of the used ones) of a pixel, in row `row` (0 or 1) of those a thread has of an m64.
  PIXELDIFF_HOST_DEVICE static constexpr int value(int pixel, int chunk, int half, int row,
                                                   int side) {
    return (pixel * kPixelColumns + chunk * kChannels + half * 8) / 2 + row * 2 + side;
  }
  // Row of the weight, of a pixel's first used chunk.
  PIXELDIFF_HOST_DEVICE static constexpr int weight_row(int pixel) {
    return (pixel * kChunks + first) * kChannels;
  }
};

// The first pair of every octet first, then the second pair, ...: a thread has one whole octet of
// one of two pixels, 16 bytes to load or to store, and four lanes have 64 bytes in a row.
template <int first, int used, int columns, int box_pixels>
struct OctetColumns {
  static constexpr int kColumns = columns;
  static constexpr int kPixels = kColumns / (used * kChannels);
  static constexpr int kTwos = kPixels / 2;  // of each, a lane has one pixel

  static constexpr int kBoxes = used * 4;
  static constexpr int kBoxOctetRows = 2, kBoxOctets = 2;
  PIXELDIFF_HOST_DEVICE static constexpr WeightBox box(int i) {
    return {i % 4 * 2, 2 * (first + i / 4)};
  }

  // Register that holds channel 2 * pair + side of the lane's octet of a chunk.
  PIXELDIFF_HOST_DEVICE static constexpr int value(int two, int chunk, int pair, int row,
                                                   int side) {
    constexpr int kBoxTwos = box_pixels / 2;
    const int box = (two / kBoxTwos * used + chunk) * 4 + pair;
    return 4 * (box * kBoxTwos + two % kBoxTwos) + row * 2 + side;
  }
  PIXELDIFF_HOST_DEVICE static constexpr int pixel(int lane, int two) {
    return 2 * two + lane % 4 / 2;
  }
  // The first channel of the lane's octet.
  PIXELDIFF_HOST_DEVICE static constexpr int channel(int lane) { return lane % 2 * 8; }
  // Row of the weight, of the first channel of a pixel's chunk (of the used ones).
  PIXELDIFF_HOST_DEVICE static constexpr int weight_row(int pixel, int chunk) {
    return (pixel * kChunks + first + chunk) * kChannels;
  }
};

}  // namespace pixeldiff::pixel_adaln
