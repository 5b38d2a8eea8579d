// Shared memory of the sm_90a attention kernels, for head dims up to one of 64, 80 and 128.
#pragma once

#include "../hopper/host_device.h"

namespace pixeldiff::attention {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups that compute; one more loads
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kQueries = 64 * kConsumers;  // of a tile
constexpr int kKeys = 128;                 // of a step

// A tile of queries, then rings of stages of keys and of values, then the barriers.
template <uint32_t query_bytes, uint32_t key_bytes, uint32_t value_bytes>
struct Sm90Shared {
  static constexpr uint32_t kQueryBytes = query_bytes;
  static constexpr uint32_t kKeyBytes = key_bytes;
  static constexpr uint32_t kValueBytes = value_bytes;
  static constexpr uint32_t kAlignment = 1024;    // eight rows of 128 bytes: the swizzle's period
  static constexpr uint32_t kLimit = 227 * 1024;  // of a block on sm_90
  static constexpr uint32_t kBarrierBytes = 256;
  static_assert(kQueryBytes % kAlignment == 0 && kKeyBytes % kAlignment == 0 &&
                    kValueBytes % kAlignment == 0,
                "every tile starts where a swizzle does");
  static constexpr int kFitting =
      (kLimit - kAlignment - kBarrierBytes - kQueryBytes) / (kKeyBytes + kValueBytes);
  static constexpr int kStages = kFitting < 4 ? kFitting : 4;  // more would hide nothing more
  static_assert(kStages >= 2, "one stage is filled while another is read");

  // Offsets from an aligned start.
  static constexpr uint32_t q = 0;
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t k(int stage) {
    return kQueryBytes + kKeyBytes * stage;
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t v(int stage) {
    return k(kStages) + kValueBytes * stage;
  }

  // Barriers, 8 bytes each.
  static constexpr uint32_t kBarriers = kQueryBytes + (kKeyBytes + kValueBytes) * kStages;
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t q_full() { return kBarriers; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t q_empty() { return kBarriers + 8; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t k_full(int stage) {
    return kBarriers + 16 + 8 * stage;
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t k_empty(int stage) {
    return k_full(kStages + stage);
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t v_full(int stage) {
    return k_full(2 * kStages + stage);
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t v_clean(int stage) {
    return k_full(3 * kStages + stage);
  }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t v_empty(int stage) {
    return k_full(4 * kStages + stage);
  }
  static_assert(16 + 8 * 5 * kStages <= kBarrierBytes, "the barriers fit");

  static constexpr uint32_t kSharedBytes = kAlignment + kBarriers + kBarrierBytes;
  static_assert(kSharedBytes <= kLimit, "a block's shared memory");
};

// A tile of 128 rows of 16-bit elements lies in panels of 128-byte rows, or of 32-byte ones where
// the channels are no multiple of 64: 72 of them then take 80, not 128. Those that a head has not
// got are 0.
template <int channels>
struct Sm90Tile : Sm90Shared<kQueries * channels * 2, kKeys * channels * 2, kKeys * channels * 2> {
  static constexpr int kChannels = channels;
  static constexpr int kPanel = kChannels % 64 == 0 ? 64 : 16;
  static constexpr int kPanels = kChannels / kPanel;
  static_assert(kPanel * kPanels == kChannels, "whole panels");
  static constexpr uint32_t kRowBytes = kPanel * 2;
  static constexpr uint32_t kPanelBytes = kQueries * kRowBytes;
  static constexpr uint32_t kTileBytes =
      kPanelBytes * kPanels;  // of queries, keys and values alike
  static_assert(kQueries == kKeys, "one tile size for all three");
};

// Of e4m3, which the tensor cores read along the contraction only: queries and keys with their
// channels side by side, in panels of 32, 64 or 128 of them; values with their keys side by side,
// 128 bytes to a channel. A contraction of 72 or 80 channels takes 96, and as columns of the
// result they take 80.
template <int channels>
struct Sm90E4m3Tile : Sm90Shared<kQueries*((channels + 31) / 32 * 32),
                                 kKeys*((channels + 31) / 32 * 32), channels * kKeys> {
  static constexpr int kChannels = channels;
  static constexpr int kDepth = (kChannels + 31) / 32 * 32;
  static constexpr int kPanel = kDepth % 128 == 0 ? 128 : kDepth % 64 == 0 ? 64 : 32;
  static constexpr int kPanels = kDepth / kPanel;
  static_assert(kPanel * kPanels == kDepth, "whole panels");
  static constexpr uint32_t kRowBytes = kPanel;
  static constexpr uint32_t kPanelBytes = kQueries * kRowBytes;
  static constexpr uint32_t kValueRowBytes = kKeys;
};

}  // namespace pixeldiff::attention
