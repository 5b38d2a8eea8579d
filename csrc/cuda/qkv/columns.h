// Which channels of the projection a tile of it holds, and where a thread finds them.
//
// A tile is some heads, side by side. Its columns are rows of W, and the order in which they lie in
// shared memory is free: where a head is a multiple of 32 channels, a thread shall hold 8 adjacent
// channels of its row, so that tables, gains and results move 16 bytes at a time. In an accumulator
// a thread has two adjacent columns of every 8 (hopper/fragment.h). So the first pair of every 8
// rows of W comes first, of the whole tile, then the second pair, ...: one box of the copy engine
// each. Otherwise the columns lie in their own order and a thread holds single pairs.
#pragma once

#include "../hopper/fragment.h"
#include "../hopper/host_device.h"

namespace pixeldiff::qkv {

template <int head_dim, int heads>
struct Columns {
  static constexpr int kHeadDim = head_dim;
  static constexpr int kHeads = heads;
  // No head in two tiles: its norm needs all of it.
  static constexpr int kColumns = kHeadDim * kHeads;
  static constexpr int kPairs = kHeadDim % 32 == 0 ? 4 : 1;  // adjacent ones of a thread
  static constexpr int kRun = 2 * kPairs;                    // the channels they are
  static constexpr int kRuns = kHeadDim / (4 * kRun);        // of a head, in a thread
  static_assert(kRuns * 4 * kRun == kHeadDim, "four lanes share a row of a head evenly");
  static_assert(kColumns % (4 * kRun) == 0 && kColumns <= 256, "one product's columns");

  static constexpr int kBoxes = kPairs;          // of a tile of W
  static constexpr int kOctetRows = 8 / kPairs;  // of every 8 rows of W, in a box
  static constexpr int kOctets = kColumns / 8;   // in each of them
  static constexpr int kBoxRows = kOctetRows * kOctets;
  static_assert(kBoxRows % 8 == 0, "a box starts where its swizzle does");

  // The first channel of a run, within its head.
  PIXELDIFF_HOST_DEVICE static constexpr int channel(int lane, int run) {
    return 4 * kRun * run + kRun * (lane % 4);
  }
  // The accumulator register of the first channel of a pair; the other is the next one.
  PIXELDIFF_HOST_DEVICE static constexpr int accumulator(int head, int run, int pair, int half) {
    return 4 * (pair * (kColumns / (4 * kRun)) + head * kRuns + run) + 2 * half;
  }
};

// The tile for a head dim: as many heads as one product takes, 256 columns or the next fewer.
template <int head_dim>
using ColumnsOf = Columns<head_dim, 256 / head_dim>;

}  // namespace pixeldiff::qkv
