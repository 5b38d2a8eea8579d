// Shared memory of the sm_90a projection kernel: a ring of stages, each 64 channels of K of a tile.
#pragma once

#include "columns.h"
#include "schedule.h"

namespace pixeldiff::qkv {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that compute, 64 rows each; one more loads
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kDepth = 64;  // channels of K of a stage: rows of 128 bytes, the widest swizzle
static_assert(kRows == 64 * kConsumers, "rows of a tile");

template <class Columns>
struct Sm90Tile {
  static constexpr uint32_t kRowBytes = kDepth * 2;
  static constexpr uint32_t kXBytes = kRows * kRowBytes;
  static constexpr uint32_t kBoxBytes = Columns::kBoxRows * kRowBytes;
  static constexpr uint32_t kStageBytes = kXBytes + Columns::kBoxes * kBoxBytes;

  static constexpr uint32_t kAlignment = 1024;    // eight rows of 128 bytes: the swizzle's period
  static constexpr uint32_t kLimit = 227 * 1024;  // of a block on sm_90
  static constexpr uint32_t kBarrierBytes = 256;
  static_assert(kXBytes % kAlignment == 0 && kBoxBytes % kAlignment == 0, "boxes are aligned");
  static constexpr int kStages = (kLimit - kAlignment - kBarrierBytes) / kStageBytes;
  static_assert(kStages >= 3, "two in the products, one on its way");

  // Offsets from an aligned start.
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t x(int stage) { return kStageBytes * stage; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t weight(int stage, int box = 0) {
    return x(stage) + kXBytes + box * kBoxBytes;
  }

  // Barriers, 8 bytes each.
  static constexpr uint32_t kBarriers = kStageBytes * kStages;
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t full(int stage) { return kBarriers + 8 * stage; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t empty(int stage) { return full(kStages + stage); }
  static_assert(8 * 2 * kStages <= kBarrierBytes, "the barriers fit");

  static constexpr uint32_t kSharedBytes = kAlignment + kBarriers + kBarrierBytes;
  static_assert(kSharedBytes <= kLimit, "a block's shared memory");
};

}  // namespace pixeldiff::qkv
