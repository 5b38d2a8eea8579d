// The kernels of local_decoder_up on the emulator, for ctypes.
#include <cstring>

#include "cuda/local_decoder/launch_up.h"
#include "emulator.h"
#include "ranges.h"

namespace {

using namespace pixeldiff;
using namespace pixeldiff::local_decoder;

struct Call {
  cuda::LocalDecoderUpArgs args;
  int slots, fault, low, high;
  uint64_t seed;
};

void compose(const Call& c) {
  const auto& a = c.args;
  const ComposeParams params = compose_params(a);
  emulator::Ranges ranges;
  ranges.writable = {range(a.workspace, params.layout.bytes())};
  ranges.readable = {range(a.up_weight, a.Cu, a.Ci), range(a.weight, a.Co, a.Cu + a.Cs),
                     range(a.up_bias, 2 * a.Cu), range(a.bias, 2 * a.Co)};
  using Kernel = Compose<emulator::Thread>;
  for (int block = 0; block < params.blocks(); ++block) {
    emulator::Block machine(Kernel::kThreads, Kernel::kSharedBytes, block, params.blocks(),
                            c.seed + block, static_cast<emulator::Fault>(c.fault), c.low, c.high,
                            ranges);
    machine.run([&](emulator::Thread& thread) { Kernel{thread, params}.run(); });
  }
}

template <int kXBlocks, int kSkipBlocks>
void multiply(const Call& c) {
  using Tile = UpTile<kXBlocks, kSkipBlocks>;
  const auto& a = c.args;
  const UpParams params = up_params(a, Tile::kColumns, c.slots);
  emulator::Ranges ranges;
  ranges.writable = {range(a.out, 8 * a.B * a.rows * a.columns * a.Co)};
  ranges.readable = {range(a.workspace, params.layout.bytes())};
  ranges.copyable = {range(a.x, a.B, a.rows, a.columns, a.Ci),
                     range(a.skip, a.S, 2 * a.rows, 2 * a.columns, a.Cs)};
  for (int block = 0; block < params.schedule.blocks(); ++block) {
    emulator::Block machine(Tile::kThreads, Tile::kSharedBytes, block, params.schedule.blocks(),
                            c.seed + block, static_cast<emulator::Fault>(c.fault), c.low, c.high,
                            ranges);
    machine.run([&](emulator::Thread& thread) {
      Up<emulator::Thread, kXBlocks, kSkipBlocks>{thread, params}.run(
          params.schedule.segment(block));
    });
  }
}

template <class F>
void with_tile(int x_blocks, int skip_blocks, F f) {
  const auto with_skip = [&](auto x) {
    constexpr int kX = decltype(x)::value;
    if (skip_blocks == 0) return f(UpTile<kX, 0>{});
    if (skip_blocks == 1) return f(UpTile<kX, 1>{});
    return f(UpTile<kX, 2>{});
  };
  if (x_blocks == 1)
    with_skip(std::integral_constant<int, 1>{});
  else
    with_skip(std::integral_constant<int, 2>{});
}

}  // namespace

extern "C" {

int emulate_compose(const Call* c, char* message, int room) {
  return guarded<Call>(c, message, room, compose);
}
int emulate_multiply(const Call* c, char* message, int room) {
  return guarded<Call>(c, message, room, [](const Call& call) {
    const Weights layout = weights_of(call.args.Ci, call.args.Cs);
    with_tile(layout.x_blocks, layout.skip_blocks, [&](auto tile) {
      multiply<decltype(tile)::kXBlocks, decltype(tile)::kSkipBlocks>(call);
    });
  });
}

int up_workspace(int Ci, int Cs) { return weights_of(Ci, Cs).bytes(); }

// edge_y, edge_x, ey, ex
void up_slot(int i, int* out) {
  const Slot s = slot(i);
  out[0] = s.edge_y, out[1] = s.edge_x, out[2] = s.ey, out[3] = s.ex;
}
// The slots that the kernel takes: inside, in an edge row, in an edge column.
void up_slots(int edge_y, int ey, int ex, int* out) {
  out[0] = inner_slot(ey, ex), out[1] = row_slot(ex), out[2] = column_slot(edge_y, ey);
}
int up_kept(int edge, int a, int r) { return kept(edge, a, r); }
int up_meets(int a, int r, int t, int e) { return meets(a, r, t, e); }
int up_fragment_at(int k, int channel) { return fragment_at(k, channel); }
int up_accumulator_channel(int i) { return accumulator_channel(i); }
// Which of a row's nine packed values the k-th of a product is; where its fragments start.
int up_packed_value(int b, int k) { return packed_value(b, k); }
int up_packed(int Ci, int b, int row) { return weights_of(Ci, kPackedChannels).packed(b, row); }
// The word of shared memory at which a square's packed pixel starts, in a row of so many bytes.
int up_packed_at(int square, int b) { return packed_at(square, b); }
int up_packed_row() { return UpTile<1, 0>::kSkipBytes; }
// Where fragments of x, of skip and the biases start.
void up_weights(int Ci, int Cs, int parity, int i, int block, int* out) {
  const Weights w = weights_of(Ci, Cs);
  out[0] = w.x(parity, i, block), out[1] = w.skip(i % 9, block);
  out[2] = w.shift(parity, i / 2 % 2, i % 2);
}

// Bytes of a stage, of shared memory, squares of a strip, threads, blocks of a multiprocessor.
void up_tile(int x_blocks, int skip_blocks, int* out) {
  with_tile(x_blocks, skip_blocks, [&](auto tile) {
    using Tile = decltype(tile);
    const int all[] = {Tile::kStageBytes, Tile::kSharedBytes, Tile::kColumns, Tile::kThreads,
                       Tile::kBlocks};
    std::memcpy(out, all, sizeof all);
  });
}
// All copies of a stage: of which image, row, pixel, piece, and where to; then, as a thread finds
// them, whether there is one and whether it is of x. Returns how many there could be.
int up_copies(int x_blocks, int skip_blocks, int* out) {
  int count = 0;
  with_tile(x_blocks, skip_blocks, [&](auto tile) {
    using Tile = decltype(tile);
    count = Tile::kCopies * Tile::kThreads;
    for (int i = 0; out != nullptr && i < count; ++i) {
      const auto copy = Tile::copy(i);
      const int k = i / Tile::kThreads;
      const int all[] = {copy.of_x,          copy.row,     copy.pixel,
                         copy.piece,         int(copy.to), Tile::is_copy(k, i),
                         Tile::is_of_x(k, i)};
      std::memcpy(out + 7 * i, all, sizeof all);
    }
  });
  return count;
}

// Images, columns and rows (first, last) of all segments; returns how many.
int up_segments(int images, int rows, int columns, int slots, int* out) {
  const Schedule s = schedule_of(images, rows, columns, UpTile<1, 1>::kColumns, slots, 2);
  for (int i = 0; out != nullptr && i < s.blocks(); ++i) {
    const auto at = s.segment(i);
    const int all[] = {at.image, at.column, at.first, at.last};
    std::memcpy(out + 4 * i, all, sizeof all);
  }
  return s.blocks();
}
}
