// The sm_90a attention kernels: what each warp does, and when.
//
// FLOPs, bytes and the time they take: docs/kernels/attention.md.
//
// M is the machine it runs on: the GPU (hopper/device.cuh), or the emulator of the tests, which
// runs this very text on a CPU. Everything a thread does to shared memory, to barriers or to other
// threads goes through it. Kind is the precision (sm90_half.h, sm90_e4m3.h): what lies where, what
// is multiplied, and what a thread makes of its two rows of queries.
//
//   warpgroup 0   one thread loads: Q of a tile, then K and V of its steps, into rings of stages.
//                 If there is a mask, another warp clears the rows of V that it leaves out, which
//                 may hold NaN, before they are multiplied by 0.
//   1 and 2       64 rows of queries each. In a step j: issue S = Q K(j)^T and P V(j - 1); when S
//                 is there, make weights of it while the other product goes on; then bring O up
//                 to date with it and with the maximum, and round the weights to P.
//
// The two take turns at issuing, so that one's softmax runs under the other's products.
#pragma once

#include "../hopper/ring.h"
#include "keep.h"
#include "schedule.h"
#include "sm90_tile.h"

namespace pixeldiff::attention {

template <class M, class Kind>
struct Sm90Attention {
  using Tile = typename Kind::Tile;
  using Map = typename M::TensorMap;
  using Rows = typename Kind::template Rows<M>;
  static constexpr int kWarps = 4 * kConsumers;
  static constexpr int kLogits = kKeys / 2;  // of a thread, in a step
  static constexpr int kTurn = 1;  // named barrier of the first consumer; 0 is the block's

  M& m;
  const typename Kind::Params& p;

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
      m.template release_registers<Kind::kLoading>();
      if (m.thread() == 0)
        load(q_map, k_map, v_map);
      else if (m.thread() / 32 == 1 && masked())
        clear();
    } else {
      m.template claim_registers<Kind::kComputing>();
      consume();
    }
  }

  PIXELDIFF_DEVICE bool masked() const {
    if constexpr (Kind::kMasks)
      return p.key_mask != nullptr;
    else
      return false;
  }
  PIXELDIFF_DEVICE const uint8_t* mask_of(const Schedule::Tile& at) const {
    if constexpr (Kind::kMasks)
      return p.key_mask == nullptr ? nullptr : p.key_mask + at.b * p.mask_stride_b;
    else
      return nullptr;
  }

  PIXELDIFF_DEVICE void load(const Map& q_map, const Map& k_map, const Map& v_map) {
    Ring<1> queries;
    Ring<Tile::kStages> keys;
    for (int i = m.block(); i < p.schedule.tiles(); i += m.blocks()) {
      const Schedule::Tile at = p.schedule.tile(i);
      m.wait(Tile::q_empty(), queries.parity_of_writer());
      m.arrive_and_expect(Tile::q_full(), Tile::kQueryBytes);
      Kind::load_rows(m, q_map, Tile::q, Tile::q_full(), at, at.row);
      queries.advance();
      for (int step = 0; step < p.schedule.steps(); ++step, keys.advance()) {
        m.wait(Tile::k_empty(keys.stage), keys.parity_of_writer());
        m.arrive_and_expect(Tile::k_full(keys.stage), Tile::kKeyBytes);
        Kind::load_rows(m, k_map, Tile::k(keys.stage), Tile::k_full(keys.stage), at, step * kKeys);
        m.wait(Tile::v_empty(keys.stage), keys.parity_of_writer());
        m.arrive_and_expect(Tile::v_full(keys.stage), Tile::kValueBytes);
        Kind::load_values(m, v_map, Tile::v(keys.stage), Tile::v_full(keys.stage), at,
                          step * kKeys);
      }
    }
  }

  PIXELDIFF_DEVICE void clear() {
    if constexpr (Kind::kMasks) {
      constexpr int kPieces = Tile::kRowBytes / 16;
      const int lane = m.thread() % 32;
      Ring<Tile::kStages> keys;
      for (int i = m.block(); i < p.schedule.tiles(); i += m.blocks()) {
        const uint8_t* mask = mask_of(p.schedule.tile(i));
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
  }

  PIXELDIFF_DEVICE void consume() {
    const int consumer = m.thread() / kWarpgroup - 1;
    const int lane = m.thread() % 32;
    const int steps = p.schedule.steps();
    Ring<1> queries;
    Ring<Tile::kStages> keys;    // of the next K
    Ring<Tile::kStages> values;  // of the next V
    bool first = true;

    float s[kLogits];
    Rows rows(m, p);

    for (int i = m.block(); i < p.schedule.tiles(); i += m.blocks()) {
      const Schedule::Tile at = p.schedule.tile(i);
      const uint8_t* mask = mask_of(at);
      const bool last = i + m.blocks() >= p.schedule.tiles();
      rows.begin(at, consumer, lane);
      rows.prepare(0);

      m.wait(Tile::q_full(), queries.parity());
      queries.advance();
      m.wait(Tile::k_full(keys.stage), keys.parity());
      take_turn(consumer, first);
      first = false;
      m.wgmma_fence();
      rows.multiply_keys(consumer, keys.stage, s);
      m.wgmma_commit();
      pass_turn(consumer, false);
      drop(mask, 0, [&] { m.template wgmma_wait<0>(s); }, s, lane);
      leave(Tile::k_empty(keys.stage));
      keys.advance();
      if (steps == 1) leave(Tile::q_empty());
      rows.weigh(s);  // nothing accumulated yet
      rows.round(s);

      for (int step = 1; step < steps; ++step) {
        rows.prepare(step);
        m.wait(Tile::k_full(keys.stage), keys.parity());
        m.wait(masked() ? Tile::v_clean(values.stage) : Tile::v_full(values.stage),
               values.parity());
        take_turn(consumer, false);
        m.wgmma_fence();
        rows.multiply_keys(consumer, keys.stage, s);
        m.wgmma_commit();
        rows.multiply_values(values.stage, 0);
        m.wgmma_commit();
        pass_turn(consumer, false);
        drop(mask, step * kKeys, [&] { m.template wgmma_wait<1>(s); }, s, lane);
        leave(Tile::k_empty(keys.stage));
        keys.advance();
        if (step == steps - 1) leave(Tile::q_empty());
        rows.weigh(s);
        collect(rows, values.stage);
        values.advance();
        rows.round(s);
      }

      m.wait(masked() ? Tile::v_clean(values.stage) : Tile::v_full(values.stage), values.parity());
      take_turn(consumer, false);
      m.wgmma_fence();
      rows.multiply_values(values.stage, 0);
      m.wgmma_commit();
      pass_turn(consumer, last);
      rows.close();
      collect(rows, values.stage);
      values.advance();
      rows.store(at, consumer, lane);
    }
  }

  // Waits for P V and adds it to O. Where O is wider than the accumulator of a product, the other
  // parts of it are multiplied only now.
  PIXELDIFF_DEVICE void collect(Rows& rows, int stage) {
    m.wgmma_wait_after(rows.softmax.total[0] + rows.softmax.total[1], rows.product, rows.weights);
    if constexpr (Kind::kParts == 1) leave(Tile::v_empty(stage));
    rows.accumulate(0);
    PIXELDIFF_UNROLL
    for (int part = 1; part < Kind::kParts; ++part) {
      m.wgmma_fence();
      rows.multiply_values(stage, part);
      m.wgmma_commit();
      m.template wgmma_wait<0>(rows.product);
      if (part == Kind::kParts - 1) leave(Tile::v_empty(stage));
      rows.accumulate(part);
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

  template <int n>
  using Ring = hopper::Ring<n>;
};

}  // namespace pixeldiff::attention
