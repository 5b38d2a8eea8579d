// The sm_90a projection kernel on the emulator, and its layouts, for ctypes.
#include <algorithm>

#include "cuda/hopper/encode.h"
#include "cuda/qkv/maps.h"
#include "cuda/qkv/params.h"
#include "emulator.h"

namespace {

using namespace pixeldiff;

struct Stream {
  int64_t rows;
  const void* x;
  int64_t x_stride_b, x_stride_n;
  const void* weight;
  int64_t weight_stride;
  const void *q_weight, *k_weight;
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
};

struct Call {
  int64_t B, K, G, d;
  Stream image, text;
  void* out;
  float eps;
  int bf16, blocks, fault, low, high;
  uint64_t seed;
};

QkvStream to_stream(const Stream& s) {
  return {s.rows,       {s.x, s.x_stride_b, s.x_stride_n},
          s.weight,     s.weight_stride,
          s.q_weight,   s.k_weight,
          s.cos,        s.sin,
          s.cos_stride, s.sin_stride};
}

QkvNormRopeArgs to_args(const Call& c) {
  return {c.B,
          c.K,
          c.G,
          c.d,
          c.bf16 ? DType::bf16 : DType::f16,
          to_stream(c.text),
          to_stream(c.image),
          c.out,
          c.eps};
}

std::pair<const char*, const char*> range(const void* p, int64_t bytes) {
  return {static_cast<const char*>(p), static_cast<const char*>(p) + bytes};
}

void add_readable(emulator::Ranges& ranges, const QkvStream& s, int64_t d) {
  if (s.rows == 0) return;
  ranges.readable.push_back(range(s.q_weight, 2 * d));
  ranges.readable.push_back(range(s.k_weight, 2 * d));
  for (int64_t n = 0; n < s.rows; ++n) {
    ranges.readable.push_back(range(s.cos + n * s.cos_stride, 2 * d));
    ranges.readable.push_back(range(s.sin + n * s.sin_stride, 2 * d));
  }
}

template <int d, bool kBf16>
void run(const Call& c) {
  using Columns = qkv::ColumnsOf<d>;
  using Tile = qkv::Sm90Tile<Columns>;
  const QkvNormRopeArgs a = to_args(c);
  const qkv::Sm90Params p = qkv::params<Columns>(a);
  const auto map = [](const hopper::TensorMapSpec& spec) {
    if (const char* reason = hopper::why_not(spec)) emulator::fail(reason);
    return emulator::Map{spec};
  };
  const QkvStream& image = a.image.rows ? a.image : a.text;
  const QkvStream& text = a.text.rows ? a.text : a.image;
  const emulator::Map x = map(qkv::x_map(a, image)), text_x = map(qkv::x_map(a, text)),
                      weight = map(qkv::weight_map<Columns>(a, image)),
                      text_weight = map(qkv::weight_map<Columns>(a, text));
  emulator::Ranges ranges;
  ranges.writable = {range(a.out, 3 * a.B * (a.text.rows + a.image.rows) * a.G * d * 2)};
  add_readable(ranges, a.image, d);
  add_readable(ranges, a.text, d);
  for (int block = 0; block < c.blocks; ++block) {
    emulator::Block machine(qkv::kThreads, Tile::kBarriers, block, c.blocks, c.seed + block,
                            static_cast<emulator::Fault>(c.fault), c.low, c.high, ranges);
    machine.run([&](emulator::Thread& thread) {
      qkv::Sm90Projection<emulator::Thread, Columns, kBf16>{thread, p}.run(x, weight, text_x,
                                                                           text_weight);
    });
  }
}

// Calls f with the columns for a head dim.
template <class F>
void with_columns(int64_t d, F f) {
  d == 64 ? f(qkv::ColumnsOf<64>{}) : d == 72 ? f(qkv::ColumnsOf<72>{}) : f(qkv::ColumnsOf<128>{});
}

}  // namespace

extern "C" {

int emulate_qkv(const Call* c, char* message, int room) {
  try {
    if (c->d == 64)
      c->bf16 ? run<64, true>(*c) : run<64, false>(*c);
    else if (c->d == 72)
      c->bf16 ? run<72, true>(*c) : run<72, false>(*c);
    else
      c->bf16 ? run<128, true>(*c) : run<128, false>(*c);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), room - 1);
    return 1;
  }
}

// Heads and columns of a tile, boxes of W and rows of one, adjacent pairs of a thread, its runs.
void qkv_columns(int d, int* out) {
  with_columns(d, [&](auto columns) {
    using C = decltype(columns);
    const int all[] = {C::kHeads, C::kColumns, C::kBoxes, C::kBoxRows, C::kPairs, C::kRuns};
    std::copy(std::begin(all), std::end(all), out);
  });
}
int qkv_channel(int d, int lane, int run) {
  int found = 0;
  with_columns(d, [&](auto columns) { found = decltype(columns)::channel(lane, run); });
  return found;
}
int qkv_accumulator(int d, int head, int run, int pair, int half) {
  int found = 0;
  with_columns(
      d, [&](auto columns) { found = decltype(columns)::accumulator(head, run, pair, half); });
  return found;
}

// Bytes of shared memory, stages, bytes of a stage and of x in it; barriers: full, empty.
void qkv_shared_memory(int d, int* out) {
  with_columns(d, [&](auto columns) {
    using Tile = qkv::Sm90Tile<decltype(columns)>;
    const uint32_t all[] = {Tile::kSharedBytes, Tile::kStages, Tile::kStageBytes,
                            Tile::kXBytes,      Tile::full(0), Tile::empty(0)};
    std::copy(std::begin(all), std::end(all), out);
  });
}

int qkv_tiles(int B, int image, int text, int column_tiles) {
  return qkv::Schedule{B, {image, text}, column_tiles}.tiles();
}
void qkv_tile(int B, int image, int text, int column_tiles, int i, int* out) {
  const auto at = qkv::Schedule{B, {image, text}, column_tiles}.tile(i);
  const int all[] = {at.stream, at.b, at.row, at.column};
  std::copy(std::begin(all), std::end(all), out);
}

// Encodes the maps of x and W of the image's stream with the given driver; 0, or 1 and a message.
int qkv_encode(hopper::EncodeTiled driver, const Call* c, void* x, void* weight, char* message) {
  try {
    const QkvNormRopeArgs a = to_args(*c);
    hopper::encode(driver, "x", qkv::x_map(a, a.image), x);
    with_columns(c->d, [&](auto columns) {
      hopper::encode(driver, "weight", qkv::weight_map<decltype(columns)>(a, a.image), weight);
    });
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), 199);
    return 1;
  }
}
}
