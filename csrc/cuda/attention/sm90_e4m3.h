// Attention in e4m3 for sm90.h: operands that quantize_e4m3.h has made, weights rounded to e4m3.
//
// The tensor cores add up e4m3 products with about 14 bits, cutting off the rest (DeepSeek-V3,
// arXiv 2412.19437, section 3.5.2), always towards 0: over 128 keys a part or two in 10^3 at most,
// over 16384 up to a fifth where the values have one sign. So P V of a step goes into an
// accumulator of its own, which is then added to O in fp32. As an FMA: O is multiplied by what the
// maximum has moved by in every step and nothing has to be decided. 32 or 40 more registers, and
// 32 to 64 FMAs a step.
#pragma once

#include "../../dtype.h"
#include "../hopper/descriptor.h"
#include "../hopper/fragment.h"
#include "schedule.h"
#include "sm90_tile.h"
#include "softmax_e4m3.h"

namespace pixeldiff::attention {

struct Sm90E4m3Params {
  Schedule schedule;
  int d;  // channels of a head, a multiple of 8, at most the kernel's
  DType dtype;
  void* o;               // (B, L, G, d) contiguous
  const float* q_scale;  // (B, G, L)
  const float* k_scale;  // (B, G, steps)
  const float* v_scale;  // (B, G, d)
  float scale_log2;      // of the logits, / ln 2
};

template <int kChannels>
struct Sm90E4m3 {
  using Tile = Sm90E4m3Tile<kChannels>;
  using Params = Sm90E4m3Params;
  static constexpr bool kMasks = false;
  static constexpr int kLoading = 56, kComputing = 224;  // registers
  // 128 channels are added up in two parts: with a second accumulator of 64 registers beside O's
  // and the logits' there would be 208 for tiles alone.
  static constexpr int kParts = kChannels > 80 ? 2 : 1;

  template <class M>
  PIXELDIFF_DEVICE static void load_rows(M& m, const typename M::TensorMap& map, uint32_t to,
                                         uint32_t full, const Schedule::Tile& at, int row) {
    PIXELDIFF_UNROLL
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      m.load_box(map, to + panel * Tile::kPanelBytes, full, panel * Tile::kPanel, at.g, row, at.b);
  }
  // Here keys lie side by side, channels below each other.
  template <class M>
  PIXELDIFF_DEVICE static void load_values(M& m, const typename M::TensorMap& map, uint32_t to,
                                           uint32_t full, const Schedule::Tile& at, int key) {
    m.load_box(map, to, full, key, at.g, 0, at.b);
  }

  // What a thread holds of its two rows of queries.
  template <class M>
  struct Rows {
    static constexpr int kLogits = kKeys / 2;       // in a step
    static constexpr int kOutputs = kChannels / 2;  // both rows together

    M& m;
    const Params& p;
    float product[kOutputs / kParts];  // P V of one step
    float o[kOutputs];                 // of those before it
    uint32_t weights[kLogits / 4];
    SoftmaxE4m3<kKeys> softmax;
    float factor[2], before[2];  // of the latest step and of the one before it
    float row_scale[2];
    int keys;         // number of the head's first step in k_scale
    float key_scale;  // of this step

    PIXELDIFF_DEVICE Rows(M& machine, const Params& params) : m(machine), p(params) {}

    PIXELDIFF_DEVICE int64_t head(const Schedule::Tile& at) const {
      return static_cast<int64_t>(at.b) * p.schedule.G + at.g;
    }
    PIXELDIFF_DEVICE int row(const Schedule::Tile& at, int consumer, int lane, int half) const {
      const int warp = m.thread() % kWarpgroup / 32;
      return at.row + 64 * consumer + hopper::accumulator_row(warp, lane, half);
    }

    PIXELDIFF_DEVICE void begin(const Schedule::Tile& at, int consumer, int lane) {
      softmax.reset();
      PIXELDIFF_UNROLL
      for (int n = 0; n < kOutputs; ++n) o[n] = 0.0f;
      keys = static_cast<int>(head(at)) * p.schedule.steps();
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int query = row(at, consumer, lane, half);
        row_scale[half] = p.scale_log2;
        if (query < p.schedule.L)
          row_scale[half] *= m.load(p.q_scale + head(at) * p.schedule.L + query);
      }
    }
    PIXELDIFF_DEVICE void prepare(int step) { key_scale = m.load(p.k_scale + (keys + step)); }

    // S = Q K^T: both lie with the channels side by side.
    PIXELDIFF_DEVICE void multiply_keys(int consumer, int stage, float (&s)[kLogits]) {
      const uint32_t rows = consumer * 64 * Tile::kRowBytes;
      const uint64_t q = hopper::k_major(m.address(Tile::q + rows), Tile::kRowBytes);
      const uint64_t k = hopper::advance(hopper::k_major(m.address(Tile::k(0)), Tile::kRowBytes),
                                         stage * Tile::kKeyBytes);
      PIXELDIFF_UNROLL
      for (int channel = 0; channel < Tile::kDepth; channel += 32) {
        const uint32_t at = channel / Tile::kPanel * Tile::kPanelBytes + channel % Tile::kPanel;
        m.wgmma_shared_e4m3(s, hopper::advance(q, at), hopper::advance(k, at), channel > 0);
      }
    }

    // P V of the step: the weights from registers, V with its keys side by side in their order.
    PIXELDIFF_DEVICE void multiply_values(int stage, int part) {
      const uint64_t v = hopper::advance(
          hopper::k_major(m.address(Tile::v(0)), Tile::kValueRowBytes),
          stage * Tile::kValueBytes + part * (kChannels / kParts) * Tile::kValueRowBytes);
      PIXELDIFF_UNROLL
      for (int key = 0; key < kKeys; key += 32)
        m.wgmma_registers_e4m3(product, &weights[key / 8], hopper::advance(v, key), key > 0);
    }

    PIXELDIFF_DEVICE void weigh(float (&s)[kLogits]) {
      // `product` still is of the step before, and so is what it has to be added by.
      float scale[2], later[2];
      constexpr float kSmallest = 1.17549435e-38f;  // times -inf, 0 would be NaN
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half)
        scale[half] = m.max(row_scale[half] * key_scale, kSmallest);
      softmax.weigh(m, s, scale, later);
      close();
      factor[0] = later[0];
      factor[1] = later[1];
    }
    PIXELDIFF_DEVICE void close() {
      before[0] = factor[0];
      before[1] = factor[1];
    }
    PIXELDIFF_DEVICE void accumulate(int part) {
      constexpr int kCount = kOutputs / kParts;
      PIXELDIFF_UNROLL
      for (int n = 0; n < kCount; ++n) {
        float& sum = o[part * kCount + n];
        sum = fmaf(sum, before[hopper::accumulator_half(n)], product[n]);
      }
    }
    PIXELDIFF_DEVICE void round(const float (&s)[kLogits]) {
      PIXELDIFF_UNROLL
      for (int r = 0; r < kLogits / 4; ++r) {
        const int i = hopper::operand8_from_accumulator(r / 4, r % 4);
        weights[r] = m.pack_e4m3(s[i], s[i + 1], s[i + 4], s[i + 5]);
      }
    }

    PIXELDIFF_DEVICE void store(const Schedule::Tile& at, int consumer, int lane) {
      const float sums[2] = {softmax.sum(m, 0), softmax.sum(m, 1)};
      const float* channel_scales = p.v_scale + head(at) * p.d;
      const int size = p.dtype == DType::f32 ? 4 : 2;
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int query = row(at, consumer, lane, half);
        if (query >= p.schedule.L) continue;
        const int64_t index =
            (static_cast<int64_t>(at.b) * p.schedule.L + query) * p.schedule.G + at.g;
        const float inverse = m.reciprocal(sums[half]);
        char* out = static_cast<char*>(p.o) + index * p.d * size;
        PIXELDIFF_UNROLL
        for (int i = 2 * half; i < kOutputs; i += 4) {
          const int column = hopper::accumulator_column(lane, i);
          if (column >= p.d) continue;
          const float a = o[i] * inverse * m.load(channel_scales + column);
          const float b = o[i + 1] * inverse * m.load(channel_scales + column + 1);
          if (p.dtype == DType::f32)
            m.store(out + 4 * column, bits_of(a), bits_of(b));
          else if (p.dtype == DType::bf16)
            m.store(out + 2 * column, m.template pack<true>(a, b));
          else
            m.store(out + 2 * column, m.template pack<false>(a, b));
        }
      }
    }
  };
};

}  // namespace pixeldiff::attention
