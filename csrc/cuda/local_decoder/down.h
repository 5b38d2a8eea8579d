// local_decoder_down of three channels: what each warp does, and when.
//
// M is the machine it runs on: the GPU (ampere/device.cuh), or the emulator of the tests.
// Everything a thread does to shared memory or to other threads goes through it.
//
// A block walks down its strip, a row of squares a step. A product sums over the nine values of a
// row of taps; its rows are the left or the right pixels of a warp's 16 squares, so that the pool
// is a maximum of what a lane has, or next to it (down_result.h). In step s rows 2s + 1 and 2s + 2
// of x have arrived. A fragment of them is read once and multiplied for the three rows of the
// result that it reaches: the one above, which is then complete, its own and the next, which takes
// over the sums of the first. Copies are three steps ahead, and one barrier a step says that they
// are there and that what they overwrite is no longer read.
#pragma once

#include "../hopper/fragment.h"
#include "../local_decoder_down.h"
#include "down_result.h"
#include "down_tile.h"
#include "packed.h"
#include "products.h"
#include "schedule.h"

namespace pixeldiff::local_decoder {

struct DownParams {
  Schedule schedule;
  cuda::Picture x;
  int64_t x_plane;
  cuda::Taps weight;
  const char* bias;
  char* skip;
  char* pooled;
};

template <class M, bool kPlanes, int kChannels>
struct Down {
  using Tile = DownTile<kPlanes, kChannels>;
  using Result = DownResult<kChannels>;
  using Segment = Schedule::Segment;
  static constexpr int kSums = 2 * Result::kChannels;   // accumulators of a product
  static constexpr int kPairs = Result::kChannels / 2;  // words of a lane's results
  static constexpr int kSkipBytes = 2 * kChannels * 2;  // of two pixels in a row
  static constexpr int kPooledBytes = kChannels * 2;

  M& m;
  const DownParams& p;

  uint32_t weights[3][Result::kWords];  // of a row of taps
  float shift[Result::kChannels];       // of this lane's channels
  // Of the left and the right pixels of a row of the result, by its number modulo 2: one has two
  // rows of taps at the start of a step, the other one.
  float sums[2][2][kSums];
  uint32_t larger[2][kPairs];  // of a square's upper pixels, in each half

  // Where this thread's copies come from, in the row that is copied next, and go to in a stage;
  // whether there is something.
  const char* from[Tile::kCopies];
  uint32_t to[Tile::kCopies];
  bool there[Tile::kCopies], lower[Tile::kCopies];
  uint32_t fragment_at;  // in a row, this lane's
  // This lane's channels of its first pixel in the row that is stored next, of its first square in
  // the row of squares, and whether its squares are of the image.
  char* skip;
  char* pooled;
  bool inside[2];

  PIXELDIFF_DEVICE int lane() const { return m.thread() % 32; }
  // The first of the warp's squares, in the strip.
  PIXELDIFF_DEVICE int first_square() const { return m.thread() / 32 * Tile::kSquares; }

  PIXELDIFF_DEVICE void run(const Segment at) {
    find_copies(at);
    for (int i = 0; i < Tile::kAhead; ++i) start_copies(at, at.first - 1 + i);
    load_weights();
    find_fragments();
    find_results(at);
    for (int s = at.first - 1; s < at.last; ++s) {
      m.template wait_copies<Tile::kAhead - 1>();
      m.sync_block();
      start_copies(at, s + Tile::kAhead);
      multiply<0>(at, s);
      multiply<1>(at, s);
    }
  }

  // --- copies

  PIXELDIFF_DEVICE void find_copies(const Segment& at) {
    constexpr int kSize = kPlanes ? 4 : 2;
    PIXELDIFF_UNROLL
    for (int k = 0; k < Tile::kCopies; ++k) {
      const typename Tile::Copy copy = Tile::copy(m.thread() + k * Tile::kThreads);
      const int64_t byte =
          static_cast<int64_t>(at.column) * Tile::kPartSquareBytes + 16 * (copy.piece - 1);
      const int64_t row = 2 * static_cast<int64_t>(at.first - 1) + 1 + copy.row;
      from[k] = static_cast<const char*>(p.x.data) + byte +
                kSize * (at.image * p.x.stride_b + row * p.x.stride_h + copy.part * p.x_plane);
      to[k] = copy.to;
      lower[k] = copy.row == 0;
      // A piece is of several pixels, and of the image or not as a whole.
      there[k] =
          byte >= 0 && byte < static_cast<int64_t>(p.schedule.columns) * Tile::kPartSquareBytes;
    }
  }

  // Rows 2s + 1 and 2s + 2, as one group. What is outside is zero. To be called for one s after the
  // other.
  PIXELDIFF_DEVICE void start_copies(const Segment& at, int s) {
    if (s < at.last) {
      PIXELDIFF_UNROLL
      for (int k = 0; k < Tile::kCopies; ++k) {
        if (!Tile::is_copy(k, m.thread() + k * Tile::kThreads)) continue;
        const bool inside = lower[k] ? s >= 0 : s + 1 < p.schedule.rows;
        m.copy16(Tile::stage(s) + to[k], from[k], inside && there[k]);
        from[k] += (kPlanes ? 8 : 4) * p.x.stride_h;
      }
    }
    m.commit_copies();
  }

  // --- weights

  PIXELDIFF_DEVICE float load(const char* from) {
    float x[1];
    m.template load<DType::bf16, 1>(from, x);
    return x[0];
  }

  PIXELDIFF_DEVICE void load_weights() {
    const char* from = static_cast<const char*>(p.weight.data);
    // 32 bits, for the sake of registers: check_args.
    const int stride_n = static_cast<int>(p.weight.stride_n),
              stride_c = static_cast<int>(p.weight.stride_c),
              stride_r = static_cast<int>(p.weight.stride_r),
              stride_s = static_cast<int>(p.weight.stride_s);
    PIXELDIFF_UNROLL
    for (int word = 0; word < Result::kWords; ++word) {
      const int channel = Result::weight_channel(lane(), word), k = fragment_k(lane(), word);
      PIXELDIFF_UNROLL
      for (int row = 0; row < 3; ++row) {
        float both[2];
        PIXELDIFF_UNROLL
        for (int i = 0; i < 2; ++i) {
          // Read in any case, so that no load waits for another one.
          const int value = Tile::value(k + i), known = value < 0 || value > 8 ? 0 : value;
          const int at =
              channel * stride_n + known % 3 * stride_c + row * stride_r + known / 3 * stride_s;
          const float x = load(from + 2 * static_cast<int64_t>(at));
          both[i] = known == value ? x : 0.0f;
        }
        weights[row][word] = m.template pack<true>(both[0], both[1]);
      }
    }
    PIXELDIFF_UNROLL
    for (int i = 0; i < Result::kChannels; ++i)
      shift[i] = load(p.bias + 2 * Result::channel(lane(), i));
    PIXELDIFF_UNROLL
    for (int i = 0; i < 4 * kSums; ++i) sums[i / kSums / 2][i / kSums % 2][i % kSums] = 0.0f;
  }

  // --- products

  PIXELDIFF_DEVICE void find_fragments() {
    const int square = first_square() + hopper::accumulator_row(0, lane(), 0);
    const int channel = lane() % 4;
    fragment_at = kPlanes ? Tile::plane_at(square, channel < 3 ? channel : 2)
                          : packed_at(square, 1) + channel * 4;
  }

  // A of the left pixels and of the right ones.
  PIXELDIFF_DEVICE void load_values(uint32_t row, uint32_t (&left)[4], uint32_t (&right)[4]) {
    if constexpr (!kPlanes) {
      load_packed(m, row + fragment_at, 1, lane(), right);
      load_between(m, row + fragment_at - 2 * kPackedChannels, lane(), left);
    } else {
      const bool any = lane() % 4 < 3;
      PIXELDIFF_UNROLL
      for (int half = 0; half < 2; ++half) {
        float x[4];
        PIXELDIFF_UNROLL
        for (int i = 0; i < 4; ++i)
          x[i] = m.get(row + fragment_at + half * 8 * Tile::kPartSquareBytes + 4 * i);
        left[half] = any ? m.template pack<true>(x[0], x[1]) : 0;
        left[2 + half] = any ? m.template pack<true>(x[2], 0.0f) : 0;
        right[half] = any ? m.template pack<true>(x[1], x[2]) : 0;
        right[2 + half] = any ? m.template pack<true>(x[3], 0.0f) : 0;
      }
    }
  }

  // Row 2s + 1 + kRow of x.
  template <int kRow>
  PIXELDIFF_DEVICE void multiply(const Segment& at, int s) {
    uint32_t values[2][4];
    load_values(Tile::stage(s) + Tile::row(kRow), values[0], values[1]);
    add_row(2, values, sums[kRow]);
    add_row(1, values, sums[1 - kRow]);
    if (s >= at.first) store<kRow>(sums[kRow]);
    PIXELDIFF_UNROLL
    for (int i = 0; i < 2 * kSums; ++i)
      sums[kRow][i / kSums][i % kSums] = shift[Result::sum_channel(i % kSums)];
    add_row(0, values, sums[kRow]);
  }
  PIXELDIFF_DEVICE void add_row(int row, const uint32_t (&values)[2][4], float (&to)[2][kSums]) {
    PIXELDIFF_UNROLL
    for (int b = 0; b < 2; ++b) add(m, to[b], values[b], weights[row]);
  }

  // --- results

  PIXELDIFF_DEVICE void find_results(const Segment& at) {
    const int64_t column = at.column + first_square() + hopper::accumulator_row(0, lane(), 0);
    const int64_t row = static_cast<int64_t>(at.image) * p.schedule.rows + at.first;
    skip = p.skip + (2 * row * p.schedule.columns + column) * kSkipBytes + Result::skip_at(lane());
    pooled =
        p.pooled + (row * p.schedule.columns + column) * kPooledBytes + Result::pooled_at(lane());
    for (int half = 0; half < 2; ++half)
      inside[half] = Result::has_values(lane()) && column + 8 * half < p.schedule.columns;
  }

  // In each half of a row of squares; of the lower one also of the squares. To be called for one
  // row after the other.
  template <int kRow>
  PIXELDIFF_DEVICE void store(const float (&from)[2][kSums]) {
    PIXELDIFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      if constexpr (kChannels == kOut)
        store_wide<kRow>(from, half);
      else
        store_packed<kRow>(from, half);
    }
    const int64_t columns = p.schedule.columns;
    skip += columns * kSkipBytes;
    if (kRow == 1) pooled += columns * kPooledBytes;
  }

  // Four channels of both pixels.
  template <int kRow>
  PIXELDIFF_DEVICE void store_wide(const float (&from)[2][kSums], int half) {
    uint32_t left[2], right[2];
    activate(m, from[0], half, left);
    activate(m, from[1], half, right);
    PIXELDIFF_UNROLL
    for (int n = 0; n < 2; ++n) {
      const uint32_t both = m.max_bf16(left[n], right[n]);
      larger[half][n] = kRow == 0 ? both : m.max_bf16(larger[half][n], both);
    }
    if (!inside[half]) return;
    m.store(skip + half * 8 * kSkipBytes, left[0], left[1]);
    m.store(skip + half * 8 * kSkipBytes + kPooledBytes, right[0], right[1]);
    if (kRow == 1) m.store(pooled + half * 8 * kPooledBytes, larger[half][0], larger[half][1]);
  }

  // Two of a square's six values. The maximum of a lane's first one and of that in the other pixel,
  // which another lane has, is of the square.
  template <int kRow>
  PIXELDIFF_DEVICE void store_packed(const float (&from)[2][kSums], int half) {
    float x[2];
    PIXELDIFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float left = from[0][2 * half + i], right = from[1][2 * half + i];
      x[i] = silu(m, Result::is_left(lane(), i) ? left : right);
    }
    const uint32_t both = m.template pack<true>(x[0], x[1]);
    if (inside[half]) m.store(skip + half * 8 * kSkipBytes, both);
    larger[half][0] = kRow == 0 ? both : m.max_bf16(larger[half][0], both);
    if (kRow == 0) return;
    const uint32_t other = m.shuffle(larger[half][0], Result::partner(lane()));
    const uint32_t most = m.max_bf16(larger[half][0], other >> 16);
    if (inside[half]) m.store_low(pooled + half * 8 * kPooledBytes, most);
  }
};

}  // namespace pixeldiff::local_decoder
