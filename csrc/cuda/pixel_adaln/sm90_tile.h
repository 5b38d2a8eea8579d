// Tiles of the sm_90a pixel_adaln kernels: shared memory, clusters, columns.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::pixel_adaln {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that compute; one more loads
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kChannels = 16;  // of a pixel
constexpr int kChunks = 6;     // of the projection, and 16 channels each

// A cluster is 2 x 2 blocks. Blocks of a row have the same patches, those of a column the same
// pixels: each loads half of what it shares, for both. 64 FLOPs for each byte that the second-level
// cache gives become 128.
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

// `used` chunks of each pixel from `first` on. One of them after the other, and the pixels one
// after the other, are the columns of a product: rows of the weight as they lie, used * 16 at a
// time.
template <int first, int used>
struct Sm90Tile {
  static constexpr int kFirst = first, kUsed = used;
  static constexpr int kRows = 128;  // patches of a block's tile, two m64
  static constexpr int kColumns = 128;
  static constexpr int kPixelColumns = used * kChannels;
  static constexpr int kPixels = kColumns / kPixelColumns;
  static_assert(kPixels * kPixelColumns == kColumns && kPixels % kClusterSide == 0,
                "whole pixels, and as many for each block of a column to load");

  static constexpr int kDepth = 64;  // of D in a step: a panel of 128-byte rows
  static constexpr uint32_t kRowBytes = kDepth * 2;
  static constexpr uint32_t kOperandBytes = kRows * kRowBytes;
  static constexpr uint32_t kStageBytes = 2 * kOperandBytes;
  // 192 KB; with a seventh the first-level cache would have 28 KB left, and not 60.
  static constexpr int kStages = 6;

  // What one block loads of the patches and of a pixel's weights.
  static constexpr int kBoxRows = kRows / kClusterSide;
  static constexpr int kBoxPixels = kPixels / kClusterSide;
  static constexpr uint32_t kBoxBytes = kBoxRows * kRowBytes;
  static constexpr uint32_t kPixelBytes = kPixelColumns * kRowBytes;

  static constexpr uint32_t kAlignment = 1024;    // eight rows of 128 bytes: the swizzle's period
  static constexpr uint32_t kLimit = 227 * 1024;  // of a block on sm_90

  // Offsets from an aligned start.
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t patches(int stage) { return stage * kStageBytes; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t weights(int stage) {
    return patches(stage) + kOperandBytes;
  }
  static constexpr uint32_t kBarriers = kStages * kStageBytes;  // 8 bytes each
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t full(int stage) { return kBarriers + 8 * stage; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t empty(int stage) { return full(kStages + stage); }
  static constexpr uint32_t kSharedBytes = kAlignment + kBarriers + 16 * kStages;
  static_assert(kSharedBytes <= kLimit, "a block's shared memory");

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

}  // namespace pixeldiff::pixel_adaln
