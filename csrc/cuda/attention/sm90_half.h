// Attention in bf16 and fp16 for sm90.h: operands as the caller has them, weights rounded to 16
// bits.
#pragma once

#include "../hopper/descriptor.h"
#include "../hopper/fragment.h"
#include "results.h"
#include "schedule.h"
#include "sm90_tile.h"
#include "softmax.h"

namespace pixeldiff::attention {

struct Sm90Params {
  Schedule schedule;
  int d;                    // channels of a head, at most the kernel's
  void* o;                  // (B, L, G, d) contiguous, 16-bit
  float* lse;               // (B, L, G) contiguous, or nullptr
  const uint8_t* key_mask;  // (B, S), or nullptr
  int64_t mask_stride_b;
  float scale;
  float scale_log2;  // scale / ln 2
};

template <int kChannels, bool kBf16>
struct Sm90Half {
  using Tile = Sm90Tile<kChannels>;
  using Params = Sm90Params;
  static constexpr bool kMasks = true;
  static constexpr int kLoading = 56, kComputing = 224;  // registers
  static constexpr int kParts = 1;

  template <class M>
  PIXELDIFF_DEVICE static void load_rows(M& m, const typename M::TensorMap& map, uint32_t to,
                                         uint32_t full, const Schedule::Tile& at, int row) {
    PIXELDIFF_UNROLL
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      m.load_box(map, to + panel * Tile::kPanelBytes, full, panel * Tile::kPanel, at.g, row, at.b);
  }
  template <class M>
  PIXELDIFF_DEVICE static void load_values(M& m, const typename M::TensorMap& map, uint32_t to,
                                           uint32_t full, const Schedule::Tile& at, int row) {
    load_rows(m, map, to, full, at, row);
  }

  // What a thread holds of its two rows of queries.
  template <class M>
  struct Rows {
    static constexpr int kLogits = kKeys / 2;       // in a step
    static constexpr int kOutputs = kChannels / 2;  // both rows together

    M& m;
    const Params& p;
    float product[kOutputs];
    uint32_t weights[kLogits / 2];
    Softmax<kKeys> softmax;
    float factor[2];
    bool moved;

    PIXELDIFF_DEVICE Rows(M& machine, const Params& params) : m(machine), p(params) {}

    PIXELDIFF_DEVICE void begin(const Schedule::Tile&, int, int) {
      softmax.reset();
      PIXELDIFF_UNROLL
      for (int n = 0; n < kOutputs; ++n) product[n] = 0.0f;
    }
    PIXELDIFF_DEVICE void prepare(int) {}

    // S = Q K^T: both lie with the channels side by side.
    PIXELDIFF_DEVICE void multiply_keys(int consumer, int stage, float (&s)[kLogits]) {
      const uint32_t rows = consumer * 64 * Tile::kRowBytes;
      const uint64_t q = hopper::k_major(m.address(Tile::q + rows), Tile::kRowBytes);
      const uint64_t k = hopper::advance(hopper::k_major(m.address(Tile::k(0)), Tile::kRowBytes),
                                         stage * Tile::kTileBytes);
      PIXELDIFF_UNROLL
      for (int channel = 0; channel < kChannels; channel += 16) {
        const uint32_t at = channel / Tile::kPanel * Tile::kPanelBytes + channel % Tile::kPanel * 2;
        m.template wgmma_shared<kBf16>(s, hopper::advance(q, at), hopper::advance(k, at),
                                       channel > 0);
      }
    }

    // O += P V: the weights from registers, V with its channels side by side too, which are N here.
    PIXELDIFF_DEVICE void multiply_values(int stage, int) {
      const uint64_t v = hopper::advance(
          hopper::n_major(m.address(Tile::v(0)), Tile::kRowBytes, Tile::kPanelBytes),
          stage * Tile::kTileBytes);
      PIXELDIFF_UNROLL
      for (int key = 0; key < kKeys; key += 16)
        m.template wgmma_registers<kBf16>(product, &weights[key / 4],
                                          hopper::advance(v, key * Tile::kRowBytes));
    }

    PIXELDIFF_DEVICE void weigh(float (&s)[kLogits]) {
      moved = softmax.weigh(m, s, p.scale_log2, factor);
    }
    PIXELDIFF_DEVICE void close() { moved = false; }
    PIXELDIFF_DEVICE void accumulate(int) {
      if (moved) {
        PIXELDIFF_UNROLL
        for (int n = 0; n < kOutputs; ++n) product[n] *= factor[hopper::accumulator_half(n)];
      }
    }
    PIXELDIFF_DEVICE void round(const float (&s)[kLogits]) {
      PIXELDIFF_UNROLL
      for (int r = 0; r < kLogits / 2; ++r) {
        const int i = hopper::operand_from_accumulator(r / 4, r % 4);
        weights[r] = m.template pack<kBf16>(s[i], s[i + 1]);
      }
    }

    PIXELDIFF_DEVICE void store(const Schedule::Tile& at, int consumer, int lane) {
      const int warp = m.thread() % kWarpgroup / 32;
      const float sums[2] = {softmax.sum(m, 0), softmax.sum(m, 1)};
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = at.row + 64 * consumer + hopper::accumulator_row(warp, lane, half);
        store_row<kBf16>(m, {p.d, p.o, p.lse}, p.schedule, at, row, half, product, sums[half],
                         softmax.most[half], p.scale);
      }
    }
  };
};

}  // namespace pixeldiff::attention
