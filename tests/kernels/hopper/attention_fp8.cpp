// Attention in e4m3 on the emulator, for ctypes: the kernels that quantise, and the one that
// attends.
#include <algorithm>

#include "cuda/attention/e4m3_plan.h"
#include "cuda/attention/sm90.h"
#include "cuda/hopper/encode.h"
#include "emulator.h"

namespace {

using namespace pixeldiff;

struct Call {
  int64_t B, L, S, G, d;
  const void *q, *k, *v;
  int64_t strides[9];  // of q, k, v over images, rows, heads
  void* o;
  char* workspace;
  float scale;
  int dtype, blocks, fault, low, high, keeps_14_bits;
  uint64_t seed;
};

JointAttentionArgs arguments(const Call& c) {
  const auto heads = [&](const void* data, int i) {
    return Heads{data, c.strides[3 * i], c.strides[3 * i + 1], c.strides[3 * i + 2]};
  };
  return {c.B,
          c.L,
          c.S,
          c.G,
          c.d,
          static_cast<DType>(c.dtype),
          heads(c.q, 0),
          heads(c.k, 1),
          heads(c.v, 2),
          c.o,
          c.scale,
          nullptr,
          0,
          nullptr};
}

std::pair<const char*, const char*> range(const void* p, int64_t bytes) {
  return {static_cast<const char*>(p), static_cast<const char*>(p) + bytes};
}

// Rows of d elements that start at non-negative strides.
void add_rows(emulator::Ranges& ranges, const Call& c, const void* data, const int64_t* strides,
              int64_t rows) {
  const int64_t size = c.dtype == 0 ? 4 : 2;
  const auto first = static_cast<const char*>(data);
  ranges.readable.push_back(range(first, size * ((c.B - 1) * strides[0] + (rows - 1) * strides[1] +
                                                 (c.G - 1) * strides[2] + c.d)));
}

template <DType kType, int kLanes>
void quantize(const Call& c) {
  const attention::E4m3Plan plan = attention::plan_e4m3(arguments(c), c.workspace);
  emulator::Ranges ranges;
  add_rows(ranges, c, c.q, c.strides, c.L);
  add_rows(ranges, c, c.k, c.strides + 3, c.S);
  add_rows(ranges, c, c.v, c.strides + 6, c.S);
  ranges.readable.push_back(range(c.workspace, plan.bytes));
  ranges.writable = {range(c.workspace, plan.bytes)};
  const auto run = [&](int64_t threads, const auto& kernel) {
    constexpr int kThreads = attention::kQuantizeThreads;
    const int blocks = static_cast<int>((threads + kThreads - 1) / kThreads);
    for (int block = 0; block < blocks; ++block) {
      emulator::Block machine(kThreads, 0, block, blocks, c.seed + block, emulator::kNone, 0, 0,
                              ranges);
      machine.run([&](emulator::Thread& thread) {
        kernel(attention::Quantizer<emulator::Thread, kType>{thread, plan.quantize});
      });
    }
  };
  run(plan.statistics, [](auto quantizer) { quantizer.statistics(); });
  run(plan.totals, [](auto quantizer) { quantizer.totals(); });
  run(plan.queries, [](auto quantizer) { quantizer.template queries<kLanes>(); });
  run(plan.keys, [](auto quantizer) { quantizer.template keys<kLanes>(); });
  run(plan.values, [](auto quantizer) { quantizer.values(); });
}

template <int kChannels>
void attend(const Call& c) {
  using Kind = attention::Sm90E4m3<kChannels>;
  using Tile = typename Kind::Tile;
  const attention::E4m3Plan plan = attention::plan_e4m3(arguments(c), c.workspace);
  const auto map = [](const hopper::TensorMapSpec& spec) {
    if (const char* reason = hopper::why_not(spec)) emulator::fail(reason);
    return emulator::Map{spec};
  };
  const attention::QuantizeE4m3& made = plan.quantize;
  const emulator::Map q = map(attention::rows_map_e4m3<Tile>(made, made.q8, made.L)),
                      k = map(attention::rows_map_e4m3<Tile>(made, made.k8, made.S)),
                      v = map(attention::values_map_e4m3<Tile>(made));
  emulator::Ranges ranges;
  const int64_t heads = c.B * c.G, size = c.dtype == 0 ? 4 : 2;
  ranges.writable = {range(c.o, heads * c.L * c.d * size)};
  ranges.readable = {range(made.q_scale, heads * c.L * 4),
                     range(made.k_scale, heads * made.steps * 4),
                     range(made.v_scale, heads * c.d * 4)};
  for (int block = 0; block < c.blocks; ++block) {
    emulator::Block machine(attention::kThreads, Tile::kBarriers, block, c.blocks, c.seed + block,
                            static_cast<emulator::Fault>(c.fault), c.low, c.high, ranges);
    machine.keeps_14_bits = c.keeps_14_bits;
    machine.run([&](emulator::Thread& thread) {
      attention::Sm90Attention<emulator::Thread, Kind>{thread, plan.attend}.run(q, k, v);
    });
  }
}

template <class Function>
int guarded(char* message, int room, const Function& function) {
  try {
    function();
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), room - 1);
    return 1;
  }
}

template <DType kType>
void quantize(const Call& c) {
  attention::lanes_of(c.d) == 8 ? quantize<kType, 8>(c) : quantize<kType, 16>(c);
}

}  // namespace

extern "C" {

int emulate_quantize(const Call* c, char* message, int room) {
  return guarded(message, room, [&] {
    c->dtype == 0   ? quantize<DType::f32>(*c)
    : c->dtype == 1 ? quantize<DType::bf16>(*c)
                    : quantize<DType::f16>(*c);
  });
}

int emulate_attend(const Call* c, char* message, int room) {
  return guarded(message, room, [&] {
    c->d <= 64 ? attend<64>(*c) : c->d <= 80 ? attend<80>(*c) : attend<128>(*c);
  });
}

// Of the workspace: its bytes, then where q8, k8, v8, q_scale, k_scale, v_scale and the mean lie,
// then bytes of a row of q8 and of one of v8.
void plan(const Call* c, int64_t* out) {
  const auto start = reinterpret_cast<char*>(uintptr_t{1} << 20);
  const attention::E4m3Plan made = attention::plan_e4m3(arguments(*c), start);
  const attention::QuantizeE4m3& q = made.quantize;
  const void* places[] = {q.q8, q.k8, q.v8, q.q_scale, q.k_scale, q.v_scale, q.mean};
  *out++ = made.bytes;
  for (const void* place : places) *out++ = static_cast<const char*>(place) - start;
  *out++ = q.width;
  *out++ = q.padded_keys;
}

// Encodes the maps of q, k and v with the given driver, 128 bytes each.
int encode_maps(const Call* c, hopper::EncodeTiled driver, char* maps, char* message, int room) {
  return guarded(message, room, [&] {
    const attention::E4m3Plan made = attention::plan_e4m3(arguments(*c), c->workspace);
    const auto encode = [&](auto tile) {
      using Tile = decltype(tile);
      const auto& q = made.quantize;
      hopper::encode(driver, "q", attention::rows_map_e4m3<Tile>(q, q.q8, q.L), maps);
      hopper::encode(driver, "k", attention::rows_map_e4m3<Tile>(q, q.k8, q.S), maps + 128);
      hopper::encode(driver, "v", attention::values_map_e4m3<Tile>(q), maps + 256);
    };
    c->d <= 64   ? encode(attention::Sm90E4m3Tile<64>{})
    : c->d <= 80 ? encode(attention::Sm90E4m3Tile<80>{})
                 : encode(attention::Sm90E4m3Tile<128>{});
  });
}

// As attention_barriers.
void attention_barriers(int d, int* out) {
  const auto fill = [&](auto tile) {
    using Tile = decltype(tile);
    const uint32_t all[] = {Tile::q_full(),  Tile::q_empty(),  Tile::k_full(0),  Tile::k_empty(0),
                            Tile::v_full(0), Tile::v_clean(0), Tile::v_empty(0), Tile::kStages};
    std::copy(std::begin(all), std::end(all), out);
  };
  d <= 64   ? fill(attention::Sm90E4m3Tile<64>{})
  : d <= 80 ? fill(attention::Sm90E4m3Tile<80>{})
            : fill(attention::Sm90E4m3Tile<128>{});
}

void round_e4m3(const float* x, uint8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = emulator::to_e4m3(x[i]);
}
void widen_e4m3(const uint8_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = emulator::from_e4m3(x[i]);
}
float add_up_14_bits(float c, const float* products) {
  float copy[32];
  std::copy(products, products + 32, copy);
  return emulator::add_up_14_bits(c, copy);
}
}
