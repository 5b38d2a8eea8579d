// Shared memory and the division of work of the mma.sync attention kernel, for head dims up to one
// of 64, 80 and 128.
#pragma once

#include "../ampere/rows.h"

namespace pixeldiff::attention {

template <int channels>
struct MmaTile {
  static constexpr int kChannels = channels;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  // Rows of 16 queries that a warp multiplies at once. With one, every product would read 256 bytes
  // of keys from shared memory, in the two clocks that it takes a multiprocessor of sm_80: all that
  // shared memory gives.
  static constexpr int kRowTiles = 2;
  static constexpr int kQueries = 16 * kRowTiles * kWarps;
  // Of a step. Wide heads leave registers for the logits of 32 only.
  static constexpr int kKeys = kChannels <= 80 ? 64 : 32;
  // So that no step reads them again. Wide heads have no registers left for them either.
  static constexpr bool kQueriesInRegisters = kChannels <= 80;
  // One is filled while the other is read. A step takes a thousand clocks and more, L2 answers in
  // less.
  static constexpr int kStages = 2;
  // Of 16 exponentials, those on the FMA units: none, as tensor cores need twice the time of the
  // special-function units on sm_80 and eight times on the others (docs/kernels/attention.md).
  static constexpr int kPolynomials = 0;

  using Rows = ampere::Rows<kChannels / 8>;
  static constexpr uint32_t kKeyBytes = kKeys * Rows::kBytes;  // of values too
  static constexpr uint32_t kStageBytes = 2 * kKeyBytes;
  static constexpr uint32_t kQueryBytes = kQueries * Rows::kBytes;

  PIXELDIFF_HOST_DEVICE static constexpr uint32_t k(int stage) { return stage * kStageBytes; }
  PIXELDIFF_HOST_DEVICE static constexpr uint32_t v(int stage) { return k(stage) + kKeyBytes; }
  // Queries on their way to registers pass through the stage that is filled second.
  static constexpr uint32_t q = kQueriesInRegisters ? kStageBytes : kStages * kStageBytes;
  static_assert(!kQueriesInRegisters || kQueryBytes <= kStageBytes, "they fit into a stage");

  static constexpr uint32_t kAlignment = 128;  // all banks
  static constexpr uint32_t kSharedBytes =
      kAlignment + kStages * kStageBytes + (kQueriesInRegisters ? 0 : kQueryBytes);

  // A multiprocessor keeps 1 KB of each block for itself. 255 registers leave room for two blocks,
  // and two there should be, so that one's softmax runs under the other's products; wide heads,
  // whose products take twice as long, may be alone where shared memory is small.
  static constexpr int kBlocks = 2;
  static constexpr uint32_t kLimitSm80 = 163 * 1024, kAllSm80 = 164 * 1024;
  static constexpr uint32_t kLimitSm89 = 99 * 1024, kAllSm89 = 100 * 1024;  // sm_86, sm_120 too
  static_assert(kSharedBytes <= kLimitSm80 && kSharedBytes <= kLimitSm89, "a block's");
  static_assert(kBlocks * (kSharedBytes + 1024) <= (kChannels <= 80 ? kAllSm89 : kAllSm80),
                "two blocks'");
};

}  // namespace pixeldiff::attention
