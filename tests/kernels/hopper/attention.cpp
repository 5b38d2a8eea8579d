// The attention kernels on the emulator, for ctypes.
#include "cuda/attention/sm90.h"
#include "cuda/attention/sm90_half.h"

#include "cuda/attention/mma.h"

#include <algorithm>

#include "emulator.h"

namespace {

using namespace pixeldiff;

struct Call {
  int64_t B, L, S, G, d;
  const void *q, *k, *v;
  int64_t strides[9];  // of q, k, v over images, rows, heads
  void* o;
  float* lse;
  const uint8_t* mask;
  int64_t mask_stride_b;
  float scale;
  int bf16, blocks, fault, low, high;
  uint64_t seed;
};

template <int kChannels, bool kBf16>
void run(const Call& c) {
  using Tile = attention::Sm90Tile<kChannels>;
  const attention::Sm90Params params{
      {static_cast<int>(c.B), static_cast<int>(c.L), static_cast<int>(c.S), static_cast<int>(c.G),
       attention::kQueries, attention::kKeys},
      static_cast<int>(c.d),
      c.o,
      c.lse,
      c.mask,
      c.mask_stride_b,
      c.scale,
      c.scale * 1.4426950408889634f};
  const auto map = [&](const void* data, const int64_t* strides, int64_t rows) {
    const Heads heads{data, strides[0], strides[1], strides[2]};
    const auto spec = hopper::heads_map(heads, c.bf16, c.B, rows, c.G, c.d, Tile::kPanel, 128);
    if (const char* reason = hopper::why_not(spec)) emulator::fail(reason);
    return emulator::Map{spec};
  };
  const emulator::Map q = map(c.q, c.strides, c.L), k = map(c.k, c.strides + 3, c.S),
                      v = map(c.v, c.strides + 6, c.S);
  emulator::Ranges ranges;
  const auto range = [](const void* p, int64_t bytes) {
    return std::make_pair(static_cast<const char*>(p), static_cast<const char*>(p) + bytes);
  };
  ranges.writable = {range(c.o, c.B * c.L * c.G * c.d * 2),
                     range(c.lse, c.lse ? c.B * c.L * c.G * 4 : 0)};
  for (int64_t b = 0; c.mask && b < c.B; ++b)
    ranges.readable.push_back(range(c.mask + b * c.mask_stride_b, c.S));
  for (int block = 0; block < c.blocks; ++block) {
    emulator::Block machine(attention::kThreads, Tile::kBarriers, block, c.blocks, c.seed + block,
                            static_cast<emulator::Fault>(c.fault), c.low, c.high, ranges);
    machine.run([&](emulator::Thread& thread) {
      using Kind = attention::Sm90Half<kChannels, kBf16>;
      attention::Sm90Attention<emulator::Thread, Kind>{thread, params}.run(q, k, v);
    });
  }
}

template <int kChannels, bool kBf16>
void run_mma(const Call& c) {
  using Tile = attention::MmaTile<kChannels>;
  const auto heads = [&](const void* data, int i) {
    return Heads{data, c.strides[3 * i], c.strides[3 * i + 1], c.strides[3 * i + 2]};
  };
  const attention::MmaParams params{
      {static_cast<int>(c.B), static_cast<int>(c.L), static_cast<int>(c.S), static_cast<int>(c.G),
       Tile::kQueries, Tile::kKeys},
      heads(c.q, 0),
      heads(c.k, 1),
      heads(c.v, 2),
      {static_cast<int>(c.d), c.o, c.lse},
      c.mask,
      c.mask_stride_b,
      c.scale,
      c.scale * 1.4426950408889634f};
  emulator::Ranges ranges;
  const auto range = [](const void* p, int64_t bytes) {
    return std::make_pair(static_cast<const char*>(p), static_cast<const char*>(p) + bytes);
  };
  ranges.writable = {range(c.o, c.B * c.L * c.G * c.d * 2),
                     range(c.lse, c.lse ? c.B * c.L * c.G * 4 : 0)};
  for (int64_t b = 0; c.mask && b < c.B; ++b)
    ranges.readable.push_back(range(c.mask + b * c.mask_stride_b, c.S));
  for (const auto& [t, rows] : {std::pair(params.q, c.L), {params.k, c.S}, {params.v, c.S}})
    ranges.copyable.push_back(range(t.data, 2 * ((c.B - 1) * t.stride_b + (rows - 1) * t.stride_n +
                                                 (c.G - 1) * t.stride_g + c.d)));
  const int blocks = params.schedule.tiles();
  for (int block = 0; block < blocks; ++block) {
    emulator::Block machine(Tile::kThreads, Tile::kSharedBytes - Tile::kAlignment, block, blocks,
                            c.seed + block, static_cast<emulator::Fault>(c.fault), c.low, c.high,
                            ranges);
    machine.run([&](emulator::Thread& thread) {
      attention::MmaAttention<emulator::Thread, kChannels, kBf16>{thread, params}.run();
    });
  }
}

}  // namespace

extern "C" int emulate_attention_mma(const Call* c, char* message, int room) {
  try {
    if (c->d <= 64)
      c->bf16 ? run_mma<64, true>(*c) : run_mma<64, false>(*c);
    else if (c->d <= 80)
      c->bf16 ? run_mma<80, true>(*c) : run_mma<80, false>(*c);
    else
      c->bf16 ? run_mma<128, true>(*c) : run_mma<128, false>(*c);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), room - 1);
    return 1;
  }
}

extern "C" int emulate_attention(const Call* c, char* message, int room) {
  try {
    if (c->d <= 64)
      c->bf16 ? run<64, true>(*c) : run<64, false>(*c);
    else if (c->d <= 80)
      c->bf16 ? run<80, true>(*c) : run<80, false>(*c);
    else
      c->bf16 ? run<128, true>(*c) : run<128, false>(*c);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(message, e.what(), room - 1);
    return 1;
  }
}

// Where the barriers lie: q_full, q_empty, then k_full, k_empty, v_full, v_clean, v_empty of the
// first stage, and the number of stages.
extern "C" void attention_barriers(int d, int* out) {
  const auto fill = [&](auto tile) {
    using Tile = decltype(tile);
    const uint32_t all[] = {Tile::q_full(),  Tile::q_empty(),  Tile::k_full(0),  Tile::k_empty(0),
                            Tile::v_full(0), Tile::v_clean(0), Tile::v_empty(0), Tile::kStages};
    std::copy(std::begin(all), std::end(all), out);
  };
  d <= 64   ? fill(attention::Sm90Tile<64>{})
  : d <= 80 ? fill(attention::Sm90Tile<80>{})
            : fill(attention::Sm90Tile<128>{});
}
