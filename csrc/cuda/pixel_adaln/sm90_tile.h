// Tiles of the sm_90a pixel_adaln kernels: clusters, and shared memory.
#pragma once

#include "columns.h"

namespace pixeldiff::pixel_adaln {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that compute; one more loads
constexpr int kThreads = kWarpgroup * (1 + kConsumers);

// A cluster is 2 x 2 blocks. Blocks of a row have the same patches, those of a column the same
// pixels: each loads half of what it shares, for both. 64 FLOPs for each byte that the second-level
// cache gives become 128, where a tile has 256 columns 85 become 170.
constexpr int kClusterSide = 2;
constexpr int kCluster = kClusterSide * kClusterSide;
// The blocks that write into a block's shared memory, itself among them, read what it reads.
constexpr int kSharing = 2 * kClusterSide - 1;
PIXELDIFF_HOST_DEVICE constexpr int cluster_row(int rank) { return rank / kClusterSide; }
PIXELDIFF_HOST_DEVICE constexpr int cluster_column(int rank) { return rank % kClusterSide; }
// i of 0 to kSharing - 1; 0 is the block itself.
PIXELDIFF_HOST_DEVICE constexpr int sharing(int rank, int i) { return rank ^ i; }
// Bit r is block r.
PIXELDIFF_HOST_DEVICE constexpr uint16_t row_mask(int rank) {
  return static_cast<uint16_t>(3u << (rank & 2));
}
PIXELDIFF_HOST_DEVICE constexpr uint16_t column_mask(int rank) {
  return static_cast<uint16_t>(5u << (rank & 1));
}
static_assert(kClusterSide == 2, "the masks and sharing() are written for two");

// `parts` is how many m64 of the tile a consumer has. Two: all of it, and consumers take tiles in
// turn. One: half of it, and both work on the same tile.
template <class Columns, int parts>
struct Sm90Tile : Columns {
  using Columns::kColumns, Columns::kPixels;
  static constexpr int kRows = 128;  // patches of a block's tile
  static constexpr int kParts = parts;
  static constexpr bool kTogether = parts == 1;
  static_assert((kTogether ? kConsumers : 1) * 64 * kParts == kRows, "all rows, by somebody");
  static_assert(kPixels % kClusterSide == 0, "as many for each block of a column to load");

  static constexpr int kDepth = 64;  // of D in a step: a panel of 128-byte rows
  static constexpr uint32_t kRowBytes = kDepth * 2;
  static constexpr uint32_t kPatchBytes = kRows * kRowBytes;
  static constexpr uint32_t kStageBytes = kPatchBytes + kColumns * kRowBytes;
  // 192 KB, six or four of them; with 32 KB more the first-level cache would have 28 KB, and not
  // 60.
  static constexpr int kStages = 192 * 1024 / kStageBytes;
  static_assert(kStages >= 3, "two in the products, one on its way");

  // What one block loads of the patches and, in so many boxes, of the weights.
  static constexpr int kBoxRows = kRows / kClusterSide;
  static constexpr uint32_t kBoxBytes = kBoxRows * kRowBytes;
  static constexpr int kBoxPixels = kPixels / kClusterSide;
  static constexpr uint32_t kWeightBoxBytes =
      kBoxPixels * Columns::kBoxOctets * Columns::kBoxOctetRows * kRowBytes;
  static_assert(kClusterSide * Columns::kBoxes * kWeightBoxBytes == kColumns * kRowBytes,
                "the boxes are the tile's weights");

  static constexpr uint32_t kAlignment = 1024;    // eight rows of 128 bytes: the swizzle's period
  static constexpr uint32_t kLimit = 227 * 1024;  // of a block on sm_90
  static_assert(kBoxBytes % kAlignment == 0 && kWeightBoxBytes % kAlignment == 0,
                "a box starts where its swizzle does");

  // Offsets from an aligned start.
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t patches(int stage) { return stage * kStageBytes; }
  // `box` of those that the block in line `line` of its column of the cluster loads.
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t weights(int stage, int line = 0, int box = 0) {
    return patches(stage) + kPatchBytes + (line * Columns::kBoxes + box) * kWeightBoxBytes;
  }
  static constexpr uint32_t kBarriers = kStages * kStageBytes;  // 8 bytes each
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t full(int stage) { return kBarriers + 8 * stage; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t empty(int stage) { return full(kStages + stage); }
  // Warps that read a stage of a block.
  static constexpr int kReaders = (kTogether ? kConsumers : 1) * kWarpgroup / 32;
  static constexpr uint32_t kSharedBytes = kAlignment + kBarriers + 16 * kStages;
  static_assert(kSharedBytes <= kLimit, "a block's shared memory");
};

}  // namespace pixeldiff::pixel_adaln
