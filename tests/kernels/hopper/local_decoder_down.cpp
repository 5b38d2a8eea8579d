// The kernel of local_decoder_down on the emulator, for ctypes.
#include <cstring>

#include "cuda/local_decoder/launch_down.h"
#include "emulator.h"
#include "ranges.h"

namespace {

using namespace pixeldiff;
using namespace pixeldiff::local_decoder;

struct Call {
  cuda::LocalDecoderDownArgs args;
  int slots, fault, low, high;
  uint64_t seed;
};

template <class Tile>
void down(const Call& c) {
  const auto& a = c.args;
  const DownParams params = down_params(a, Tile::kColumns, c.slots);
  const int64_t pixels = 4 * a.B * a.rows * a.columns;
  emulator::Ranges ranges;
  ranges.writable = {range(a.skip, 2 * pixels * a.Co), range(a.pooled, pixels / 2 * a.Co)};
  ranges.readable = {range(a.weight, a.Co, a.Ci), range(a.bias, 2 * a.Co)};
  if (Tile::kPlanes)
    ranges.copyable = {range(a.x.data, 4 * ((a.B - 1) * a.x.stride_b + 2 * a.x_plane +
                                            (2 * a.rows - 1) * a.x.stride_h + 2 * a.columns))};
  else
    ranges.copyable = {range(a.x, a.B, 2 * a.rows, 2 * a.columns, a.Ci)};
  for (int block = 0; block < params.schedule.blocks(); ++block) {
    emulator::Block machine(Tile::kThreads, Tile::kSharedBytes, block, params.schedule.blocks(),
                            c.seed + block, static_cast<emulator::Fault>(c.fault), c.low, c.high,
                            ranges);
    machine.run([&](emulator::Thread& thread) {
      Down<emulator::Thread, Tile::kPlanes, Tile::kChannels>{thread, params}.run(
          params.schedule.segment(block));
    });
  }
}

template <class F>
void with_tile(bool planes, int channels, F f) {
  if (channels == kPackedChannels)
    f(DownTile<true, kPackedChannels>{});
  else if (planes)
    f(DownTile<true, kOut>{});
  else
    f(DownTile<false, kOut>{});
}

}  // namespace

extern "C" {

int emulate_down(const Call* c, char* message, int room) {
  return guarded<Call>(c, message, room, [](const Call& call) {
    with_tile(call.args.x_dtype == DType::f32, static_cast<int>(call.args.Co),
              [&](auto tile) { down<decltype(tile)>(call); });
  });
}

int down_fragment_at(int k, int channel) { return fragment_at(k, channel); }
int down_fragment_channel(int lane, int word) { return fragment_channel(lane, word); }
int down_fragment_k(int lane, int word) { return fragment_k(lane, word); }

// Bytes of a stage, of shared memory, of a row, of a plane of it; squares of a strip, threads,
// blocks of a multiprocessor.
void down_tile(int planes, int channels, int* out) {
  with_tile(planes, channels, [&](auto tile) {
    using Tile = decltype(tile);
    const int all[] = {Tile::kStageBytes, Tile::kSharedBytes, Tile::kRowBytes, Tile::kPartBytes,
                       Tile::kColumns,    Tile::kThreads,     Tile::kBlocks};
    std::memcpy(out, all, sizeof all);
  });
}
// Which of the nine values of a row of taps the k-th of a product is.
int down_value(int planes, int k) {
  return planes ? DownTile<true, kOut>::value(k) : DownTile<false, kOut>::value(k);
}
// Where a row's words of a square start: of packed pixels those of the right one, of planes those
// of a channel.
int down_at(int planes, int square, int channel) {
  return planes ? DownTile<true, kOut>::plane_at(square, channel) : packed_at(square, 1);
}
// All copies of a stage: row, part, piece, where to, and whether there is one. Returns how many
// there could be.
int down_copies(int planes, int* out) {
  int count = 0;
  with_tile(planes, kOut, [&](auto tile) {
    using Tile = decltype(tile);
    count = Tile::kCopies * Tile::kThreads;
    for (int i = 0; out != nullptr && i < count; ++i) {
      const auto copy = Tile::copy(i);
      const int all[] = {copy.row, copy.part, copy.piece, int(copy.to),
                         Tile::is_copy(i / Tile::kThreads, i)};
      std::memcpy(out + 5 * i, all, sizeof all);
    }
  });
  return count;
}

// Of three channels: that of a lane's word of weights, that of its i-th value, whether that is of
// the left pixel, the lane whose values it meets, its first bytes in skip and pooled.
void down_packed_result(int lane, int i, int* out) {
  using Result = DownResult<kPackedChannels>;
  const int all[] = {Result::weight_channel(lane, i), Result::channel(lane, i),
                     Result::is_left(lane, i),        Result::partner(lane),
                     Result::skip_at(lane),           Result::pooled_at(lane),
                     Result::has_values(lane)};
  std::memcpy(out, all, sizeof all);
}

// Images, columns and rows (first, last) of all segments; returns how many.
int down_segments(int images, int rows, int columns, int slots, int* out) {
  const Schedule s = schedule_of(images, rows, columns, DownTile<false, kOut>::kColumns, slots, 1);
  for (int i = 0; out != nullptr && i < s.blocks(); ++i) {
    const auto at = s.segment(i);
    const int all[] = {at.image, at.column, at.first, at.last};
    std::memcpy(out + 4 * i, all, sizeof all);
  }
  return s.blocks();
}
}
