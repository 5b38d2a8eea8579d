// The attention kernel of sm_80 and later: what each warp does, and when.
//
// FLOPs, bytes and the time they take: docs/kernels/attention.md.
//
// M is the machine it runs on: the GPU (ampere/device.cuh), or the emulator of the tests, which
// runs this very text on a CPU. Everything a thread does to shared memory or to other threads goes
// through it.
//
// A block takes one tile of 128 queries, 32 in each of 4 warps, and goes through the keys in steps.
// In a step: wait for its K and V, which all threads copied during the one before; a barrier, past
// which everybody has them and nobody reads the other stage any more; start copying the next step
// into that; S = Q K^T, weights of S, O += P V. Products are synchronous: what runs under them is
// the other block of the multiprocessor.
#pragma once

#include "../../joint_attention.h"
#include "../hopper/fragment.h"
#include "keep.h"
#include "mma_tile.h"
#include "results.h"
#include "schedule.h"
#include "softmax.h"

namespace pixeldiff::attention {

struct MmaParams {
  Schedule schedule;
  Heads q, k, v;  // starts and strides are multiples of 16 bytes
  Results results;
  const uint8_t* key_mask;  // (B, S), or nullptr
  int64_t mask_stride_b;
  float scale;
  float scale_log2;  // scale / ln 2
};

template <class M, int kChannels, bool kBf16>
struct MmaAttention {
  using Tile = MmaTile<kChannels>;
  using Rows = typename Tile::Rows;
  static constexpr int kKeys = Tile::kKeys;
  static constexpr int kRowTiles = Tile::kRowTiles;
  static constexpr int kLogits = kKeys / 2;       // of a thread, in a step, of 16 queries
  static constexpr int kOutputs = kChannels / 2;  // the same
  static constexpr int kFragments = kChannels / 16;
  static constexpr int kHeld = Tile::kQueriesInRegisters ? kFragments : 1;

  M& m;
  const MmaParams& p;

  PIXELDIFF_DEVICE void run() {
    const Schedule::Tile at = p.schedule.tile(m.block());
    const int steps = p.schedule.steps();
    const int lane = m.thread() % 32, warp = m.thread() / 32;
    const uint8_t* mask = p.key_mask == nullptr ? nullptr : p.key_mask + at.b * p.mask_stride_b;

    uint32_t q[kRowTiles][kHeld][4];
    float o[kRowTiles][kOutputs];
    Softmax<kKeys, Tile::kPolynomials> softmax[kRowTiles];
    PIXELDIFF_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      softmax[r].reset();
      PIXELDIFF_UNROLL
      for (int n = 0; n < kOutputs; ++n) o[r][n] = 0.0f;
    }

    copy_rows<Tile::kQueries>(p.q, at, at.row, p.schedule.L, nullptr, Tile::q);
    m.commit_copies();
    copy_step(at, 0, mask);
    if constexpr (Tile::kQueriesInRegisters) {
      m.template wait_copies<1>();
      m.sync_block();
      PIXELDIFF_UNROLL
      for (int c = 0; c < kFragments; ++c) load_queries(warp, lane, c, q, c);
    }

    for (int step = 0; step < steps; ++step) {
      m.template wait_copies<0>();
      m.sync_block();
      if (step + 1 < steps) copy_step(at, step + 1, mask);

      const int stage = step % Tile::kStages;
      const bool whole = mask == nullptr && (step + 1) * kKeys <= p.schedule.S;
      Keep<kKeys> keep;
      if (!whole) keep = Keep<kKeys>::of(m, mask, step * kKeys, p.schedule.S);
      float s[kRowTiles][kLogits];
      multiply_keys(stage, warp, lane, q, s);
      uint32_t weights[kRowTiles][kLogits / 2];
      PIXELDIFF_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        if (!whole) keep.apply(lane, s[r]);
        float factor[2];
        if (softmax[r].weigh(m, s[r], p.scale_log2, factor)) {
          PIXELDIFF_UNROLL
          for (int n = 0; n < kOutputs; ++n) o[r][n] *= factor[hopper::accumulator_half(n)];
        }
        round(s[r], weights[r]);
      }
      multiply_values(stage, lane, weights, o);
    }

    // Asked again: what is not kept through the loop leaves registers to it.
    const Schedule::Tile to = p.schedule.tile(m.block());
    PIXELDIFF_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = to.row + hopper::accumulator_row(kRowTiles * warp + r, lane, half);
        store_row<kBf16>(m, p.results, p.schedule, to, row, half, o[r], softmax[r].sum(m, half),
                         softmax[r].most[half], p.scale);
      }
    }
  }

  // K and V of a step, as one group.
  PIXELDIFF_DEVICE void copy_step(const Schedule::Tile& at, int step, const uint8_t* mask) {
    const int stage = step % Tile::kStages;
    copy_rows<kKeys>(p.k, at, step * kKeys, p.schedule.S, nullptr, Tile::k(stage));
    // 0 times NaN is NaN: the rows that a mask leaves out are 0 instead.
    copy_rows<kKeys>(p.v, at, step * kKeys, p.schedule.S, mask, Tile::v(stage));
    m.commit_copies();
  }

  // kRows rows of a head, from `first` of `count` on. 0 are those past the last, those that the
  // mask leaves out, and the channels that the head has not got.
  template <int kRows>
  PIXELDIFF_DEVICE void copy_rows(const Heads& t, const Schedule::Tile& at, int first, int count,
                                  const uint8_t* mask, uint32_t to) {
    const char* head =
        static_cast<const char*>(t.data) + 2 * (at.b * t.stride_b + at.g * t.stride_g);
    const auto copy = [&](int row, int piece, int pieces) {
      const int index = first + row;
      const bool there = index < count && (mask == nullptr || m.load(mask + index) != 0);
      const char* from = head + index * t.stride_n * 2;
      PIXELDIFF_UNROLL
      for (int i = 0; i < pieces; i += 8)
        m.copy16(to + Rows::at(row, piece + i), from + 16 * (piece + i),
                 there && 8 * (piece + i) < p.results.d);
    };
    // Eight threads take 128 bytes of a row, and two what is left of it.
    constexpr int kEights = Rows::kPieces / 8 * 8, kRest = Rows::kPieces % 8;
    PIXELDIFF_UNROLL
    for (int row = 0; row < kRows; row += Tile::kThreads / 8)
      copy(row + m.thread() / 8, m.thread() % 8, kEights);
    if constexpr (kRest > 0) {
      PIXELDIFF_UNROLL
      for (int row = 0; row < kRows; row += Tile::kThreads / kRest)
        copy(row + m.thread() / kRest, kEights + m.thread() % kRest, 1);
    }
  }

  // Channels 16 c to 16 c + 15 of the warp's queries, as A.
  PIXELDIFF_DEVICE void load_queries(int warp, int lane, int c, uint32_t (&q)[kRowTiles][kHeld][4],
                                     int to) {
    const ampere::Corner corner = ampere::down_first(lane);
    const uint32_t row =
        Tile::q + Rows::further(Rows::at(16 * kRowTiles * warp + corner.row, corner.piece), 2 * c);
    PIXELDIFF_UNROLL
    for (int r = 0; r < kRowTiles; ++r) m.load_matrices(row + 16 * r * Rows::kBytes, q[r][to]);
  }

  // S = Q K^T, 16 channels and 16 keys at a time.
  PIXELDIFF_DEVICE void multiply_keys(int stage, int warp, int lane,
                                      uint32_t (&q)[kRowTiles][kHeld][4],
                                      float (&s)[kRowTiles][kLogits]) {
    const ampere::Corner corner = ampere::across_first(lane);
    const uint32_t keys = Rows::at(corner.row, corner.piece);
    PIXELDIFF_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      PIXELDIFF_UNROLL
      for (int i = 0; i < kLogits; ++i) s[r][i] = 0.0f;
    }
    PIXELDIFF_UNROLL
    for (int c = 0; c < kFragments; ++c) {
      const int held = Tile::kQueriesInRegisters ? c : 0;
      if constexpr (!Tile::kQueriesInRegisters) load_queries(warp, lane, c, q, 0);
      PIXELDIFF_UNROLL
      for (int key = 0; key < kKeys; key += 16) {
        uint32_t b[4];
        m.load_matrices(Tile::k(stage) + Rows::further(keys, 2 * c) + key * Rows::kBytes, b);
        PIXELDIFF_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
          m.template multiply<kBf16>(&s[r][key / 2], q[r][held], b[0], b[1]);
          m.template multiply<kBf16>(&s[r][key / 2 + 4], q[r][held], b[2], b[3]);
        }
      }
    }
  }

  PIXELDIFF_DEVICE void round(const float (&s)[kLogits], uint32_t (&weights)[kLogits / 2]) {
    PIXELDIFF_UNROLL
    for (int r = 0; r < kLogits / 2; ++r) {
      const int i = hopper::operand_from_accumulator(r / 4, r % 4);
      weights[r] = m.template pack<kBf16>(s[i], s[i + 1]);
    }
  }

  // O += P V, 16 keys and 16 channels at a time.
  PIXELDIFF_DEVICE void multiply_values(int stage, int lane,
                                        const uint32_t (&weights)[kRowTiles][kLogits / 2],
                                        float (&o)[kRowTiles][kOutputs]) {
    const ampere::Corner corner = ampere::down_first(lane);
    const uint32_t values = Rows::at(corner.row, corner.piece);
    PIXELDIFF_UNROLL
    for (int key = 0; key < kKeys; key += 16) {
      PIXELDIFF_UNROLL
      for (int c = 0; c < kFragments; ++c) {
        uint32_t b[4];
        m.load_transposed(Tile::v(stage) + Rows::further(values, 2 * c) + key * Rows::kBytes, b);
        PIXELDIFF_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
          m.template multiply<kBf16>(&o[r][8 * c], &weights[r][key / 4], b[0], b[1]);
          m.template multiply<kBf16>(&o[r][8 * c + 4], &weights[r][key / 4], b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace pixeldiff::attention
