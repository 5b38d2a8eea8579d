// The sm_90a attention kernel: what each warp does, and when.
//
// FLOPs, bytes and the time they take: docs/kernels/attention.md.
//
// M is the machine it runs on: the GPU (hopper/device.cuh), or the emulator of the tests, which
// runs this very text on a CPU. Everything a thread does to shared memory, to barriers or to other
// threads goes through it.
//
//   warpgroup 0   one thread loads: Q of a tile, then K and V of its steps, into rings of stages.
//   If
//                 there is a mask, another warp clears the rows of V that it leaves out, which may
//                 hold NaN, before they are multiplied by 0.
//   1 and 2       64 rows of queries each. In a step j: issue S = Q K(j)^T and O += P V(j - 1);
//   when S
//                 is there, make weights of it while O is still being added to; then rescale O if
//                 the maximum moved, and round the weights to P.
//
// The two take turns at issuing, so that one's softmax runs under the other's products.
#pragma once

#include "../hopper/descriptor.h"
#include "../hopper/fragment.h"
#include "../hopper/ring.h"
#include "keep.h"
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

template <class M, int kChannels, bool kBf16>
struct Sm90Attention {
  using Tile = Sm90Tile<kChannels>;
  using Map = typename M::TensorMap;
  static constexpr int kWarps = 4 * kConsumers;
  static constexpr int kLogits = kKeys / 2;       // of a thread, in a step
  static constexpr int kOutputs = kChannels / 2;  // of a thread
  static constexpr int kTurn = 1;  // named barrier of the first consumer; 0 is the block's

  M& m;
  const Sm90Params& p;

  PIXELDIFF_DEVICE void run(const Map& q_map, const Map& k_map, const Map& v_map) {
    if (m.thread() == 0) {
      m.barrier_init(Tile::q_full(), 1);
      m.barrier_init(Tile::q_empty(), kWarps);
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        m.barrier_init(Tile::k_full(stage), 1);
        m.barrier_init(Tile::k_empty(stage), kWarps);
        m.barrier_init(Tile::v_full(stage), 1);
        m.barrier_init(Tile::v_clean(stage), 32);
        m.barrier_init(Tile::v_empty(stage), kWarps);
      }
      m.publish_barriers();
    }
    m.sync_block();
    // One branch for each role: the registers can change hands only so.
    if (m.thread() < kWarpgroup) {
      m.template release_registers<56>();
      if (m.thread() == 0)
        load(q_map, k_map, v_map);
      else if (m.thread() / 32 == 1 && p.key_mask != nullptr)
        clear();
    } else {
      m.template claim_registers<224>();
      consume();
    }
  }

  PIXELDIFF_DEVICE void load(const Map& q_map, const Map& k_map, const Map& v_map) {
    Ring<1> queries;
    Ring<Tile::kStages> keys;
    for (int i = m.block(); i < p.schedule.tiles(); i += m.blocks()) {
      const Schedule::Tile at = p.schedule.tile(i);
      m.wait(Tile::q_empty(), queries.parity_of_writer());
      load_tile(q_map, Tile::q, Tile::q_full(), at, at.row);
      queries.advance();
      for (int step = 0; step < p.schedule.steps(); ++step, keys.advance()) {
        m.wait(Tile::k_empty(keys.stage), keys.parity_of_writer());
        load_tile(k_map, Tile::k(keys.stage), Tile::k_full(keys.stage), at, step * kKeys);
        m.wait(Tile::v_empty(keys.stage), keys.parity_of_writer());
        load_tile(v_map, Tile::v(keys.stage), Tile::v_full(keys.stage), at, step * kKeys);
      }
    }
  }

  PIXELDIFF_DEVICE void load_tile(const Map& map, uint32_t to, uint32_t full,
                                  const Schedule::Tile& at, int row) {
    m.arrive_and_expect(full, Tile::kTileBytes);
    PIXELDIFF_UNROLL
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      m.load_box(map, to + panel * Tile::kPanelBytes, full, panel * Tile::kPanel, at.g, row, at.b);
  }

  PIXELDIFF_DEVICE void clear() {
    constexpr int kPieces = Tile::kRowBytes / 16;
    const int lane = m.thread() % 32;
    Ring<Tile::kStages> keys;
    for (int i = m.block(); i < p.schedule.tiles(); i += m.blocks()) {
      const uint8_t* mask = p.key_mask + p.schedule.tile(i).b * p.mask_stride_b;
      for (int step = 0; step < p.schedule.steps(); ++step, keys.advance()) {
        const auto keep = Keep<kKeys>::of(m, mask, step * kKeys, p.schedule.S);
        m.wait(Tile::v_full(keys.stage), keys.parity());
        PIXELDIFF_UNROLL
        for (int w = 0; w < Keep<kKeys>::kWords; ++w) {
          if (keep.words[w] == ~0u) continue;
          for (int panel = 0; panel < Tile::kPanels; ++panel) {
            const uint32_t rows =
                Tile::v(keys.stage) + panel * Tile::kPanelBytes + 32 * w * Tile::kRowBytes;
            // The swizzle moves the pieces of a row within the row only.
            for (int piece = lane; piece < 32 * kPieces; piece += 32)
              if (!(keep.words[w] >> (piece / kPieces) & 1)) m.store_zero16(rows + 16 * piece);
          }
        }
        m.publish_to_async();
        m.arrive(Tile::v_clean(keys.stage));
      }
    }
  }

  PIXELDIFF_DEVICE void consume() {
    const int consumer = m.thread() / kWarpgroup - 1;
    const int lane = m.thread() % 32;
    const int steps = p.schedule.steps();
    const bool masked = p.key_mask != nullptr;
    Ring<1> queries;
    Ring<Tile::kStages> keys;    // of the next K
    Ring<Tile::kStages> values;  // of the next V
    bool first = true;

    float s[kLogits];
    float o[kOutputs];
    uint32_t weights[kLogits / 2];
    Softmax<kKeys> softmax;

    for (int i = m.block(); i < p.schedule.tiles(); i += m.blocks()) {
      const Schedule::Tile at = p.schedule.tile(i);
      const uint8_t* mask = masked ? p.key_mask + at.b * p.mask_stride_b : nullptr;
      const bool last = i + m.blocks() >= p.schedule.tiles();
      softmax.reset();
      PIXELDIFF_UNROLL
      for (int n = 0; n < kOutputs; ++n) o[n] = 0.0f;

      m.wait(Tile::q_full(), queries.parity());
      queries.advance();
      m.wait(Tile::k_full(keys.stage), keys.parity());
      take_turn(consumer, first);
      first = false;
      m.wgmma_fence();
      multiply_keys(consumer, keys.stage, s);
      m.wgmma_commit();
      pass_turn(consumer, false);
      drop(mask, 0, [&] { m.template wgmma_wait<0>(s); }, s, lane);
      leave(Tile::k_empty(keys.stage));
      keys.advance();
      if (steps == 1) leave(Tile::q_empty());
      float factor[2];
      softmax.weigh(m, s, p.scale_log2, factor);  // nothing accumulated yet
      round(s, weights);

      for (int step = 1; step < steps; ++step) {
        m.wait(Tile::k_full(keys.stage), keys.parity());
        m.wait(masked ? Tile::v_clean(values.stage) : Tile::v_full(values.stage), values.parity());
        take_turn(consumer, false);
        m.wgmma_fence();
        multiply_keys(consumer, keys.stage, s);
        m.wgmma_commit();
        multiply_values(values.stage, weights, o);
        m.wgmma_commit();
        pass_turn(consumer, false);
        drop(mask, step * kKeys, [&] { m.template wgmma_wait<1>(s); }, s, lane);
        leave(Tile::k_empty(keys.stage));
        keys.advance();
        if (step == steps - 1) leave(Tile::q_empty());
        const bool moved = softmax.weigh(m, s, p.scale_log2, factor);
        m.template wgmma_wait<0>(o);
        leave(Tile::v_empty(values.stage));
        values.advance();
        if (moved) {
          PIXELDIFF_UNROLL
          for (int n = 0; n < kOutputs; ++n) o[n] *= factor[hopper::accumulator_half(n)];
        }
        round(s, weights);
      }

      m.wait(masked ? Tile::v_clean(values.stage) : Tile::v_full(values.stage), values.parity());
      take_turn(consumer, false);
      m.wgmma_fence();
      multiply_values(values.stage, weights, o);
      m.wgmma_commit();
      pass_turn(consumer, last);
      m.template wgmma_wait<0>(o);
      leave(Tile::v_empty(values.stage));
      values.advance();
      store(at, consumer, lane, softmax, o);
    }
  }

  // The first turn of all is the first consumer's, and after the last nobody waits for one.
  PIXELDIFF_DEVICE void take_turn(int consumer, bool first) {
    if (!(first && consumer == 0)) m.named_sync(kTurn + consumer, kWarpgroup * kConsumers);
  }
  PIXELDIFF_DEVICE void pass_turn(int consumer, bool last) {
    if (!(last && consumer == kConsumers - 1))
      m.named_arrive(kTurn + (consumer + 1) % kConsumers, kWarpgroup * kConsumers);
  }

  // This warp has read what lies behind the barrier.
  PIXELDIFF_DEVICE void leave(uint32_t empty) {
    m.sync_warp();
    if (m.thread() % 32 == 0) m.arrive(empty);
  }

  // Waits for the logits and drops those of keys that do not take part. The mask is read meanwhile.
  template <class Wait>
  PIXELDIFF_DEVICE void drop(const uint8_t* mask, int first, Wait wait, float (&s)[kLogits],
                             int lane) {
    if (mask == nullptr && first + kKeys <= p.schedule.S) {
      wait();
      return;
    }
    const auto keep = Keep<kKeys>::of(m, mask, first, p.schedule.S);
    wait();
    keep.apply(lane, s);
  }

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
  PIXELDIFF_DEVICE void multiply_values(int stage, const uint32_t (&weights)[kLogits / 2],
                                        float (&o)[kOutputs]) {
    const uint64_t v =
        hopper::advance(hopper::n_major(m.address(Tile::v(0)), Tile::kRowBytes, Tile::kPanelBytes),
                        stage * Tile::kTileBytes);
    PIXELDIFF_UNROLL
    for (int key = 0; key < kKeys; key += 16)
      m.template wgmma_registers<kBf16>(o, &weights[key / 4],
                                        hopper::advance(v, key * Tile::kRowBytes));
  }

  PIXELDIFF_DEVICE void round(const float (&s)[kLogits], uint32_t (&weights)[kLogits / 2]) {
    PIXELDIFF_UNROLL
    for (int r = 0; r < kLogits / 2; ++r) {
      const int i = hopper::operand_from_accumulator(r / 4, r % 4);
      weights[r] = m.template pack<kBf16>(s[i], s[i + 1]);
    }
  }

  PIXELDIFF_DEVICE void store(const Schedule::Tile& at, int consumer, int lane,
                              const Softmax<kKeys>& softmax, const float (&o)[kOutputs]) {
    const int warp = m.thread() % kWarpgroup / 32;
    const float sums[2] = {softmax.sum(m, 0), softmax.sum(m, 1)};
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = sums[half];
      const int row = at.row + 64 * consumer + hopper::accumulator_row(warp, lane, half);
      if (row >= p.schedule.L) continue;
      const int64_t index = (static_cast<int64_t>(at.b) * p.schedule.L + row) * p.schedule.G + at.g;
      const float inverse = sum == 0.0f ? 0.0f : m.reciprocal(sum);
      char* out = static_cast<char*>(p.o) + index * p.d * 2;
      PIXELDIFF_UNROLL
      for (int i = 2 * half; i < kOutputs; i += 4) {
        const int column = hopper::accumulator_column(lane, i);
        if (column < p.d)
          m.store(out + 2 * column, m.template pack<kBf16>(o[i] * inverse, o[i + 1] * inverse));
      }
      if (p.lse != nullptr && lane % 4 == 0) {
        constexpr float kLn2 = 0.6931471805599453f;
        m.store(p.lse + index, fmaf(softmax.most[half], p.scale, m.log2(sum) * kLn2));
      }
    }
  }

  template <int n>
  using Ring = hopper::Ring<n>;
};

}  // namespace pixeldiff::attention
