// Attention in e4m3 on the host: where its workspace lies, how many threads quantise, and what the
// copy engine is told.
#pragma once

#include "../hopper/tensor_map.h"
#include "quantize_e4m3.h"
#include "sm90_e4m3.h"

namespace pixeldiff::attention {

struct E4m3Plan {
  int64_t bytes;  // of the workspace, which starts at a multiple of 256
  QuantizeE4m3 quantize;
  Sm90E4m3Params attend;
  // Threads of each of the kernels that quantise.
  int64_t statistics, totals, queries, keys, values;
};

// Lanes that a row of queries or keys takes: 8 channels each.
constexpr int lanes_of(int64_t d) { return d <= 64 ? 8 : 16; }

// For a workspace at `start`, or just its size where there is none.
inline E4m3Plan plan_e4m3(const JointAttentionArgs& a, char* start) {
  const auto count = [](int64_t n) { return static_cast<int>(n); };
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const int64_t heads = a.B * a.G, steps = up(a.S, kKeys) / kKeys;
  const int64_t width = up(a.d, 16), padded = up(a.S, 32);

  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = start == nullptr ? nullptr : start + used;
    used += up(bytes, 256);
    return at;
  };
  const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(4 * n)); };
  E4m3Plan plan{};
  QuantizeE4m3& q = plan.quantize;
  q = {count(a.B),
       count(a.L),
       count(a.S),
       count(a.G),
       count(a.d),
       count(steps),
       count(width),
       count(padded),
       a.q,
       a.k,
       a.v,
       take(heads * a.L * width),
       take(heads * a.S * width),
       take(heads * a.d * padded),
       floats(heads * a.L),
       floats(heads * steps),
       floats(heads * a.d),
       floats(heads * steps * a.d),
       floats(heads * steps * a.d),
       floats(heads * a.d)};
  plan.bytes = used;
  plan.attend = {{count(a.B), count(a.L), count(a.S), count(a.G), kQueries, kKeys},
                 count(a.d),
                 a.dtype,
                 a.o,
                 q.q_scale,
                 q.k_scale,
                 q.v_scale,
                 a.scale * 1.4426950408889634f};
  const int64_t lanes = lanes_of(a.d);
  plan.statistics = heads * steps * (a.d / 2);
  plan.totals = heads * a.d;
  plan.queries = heads * a.L * lanes;
  plan.keys = heads * steps * 32;
  plan.values = heads * (padded / 32) * a.d;
  return plan;
}

// Panels of rows of q8 or k8.
template <class Tile>
hopper::TensorMapSpec rows_map_e4m3(const QuantizeE4m3& q, const char* data, int64_t rows) {
  const int64_t head = rows * q.width;
  return hopper::bytes_map({data, q.G * head, q.width, head}, q.B, rows, q.G, q.width, Tile::kPanel,
                           kQueries);
}
// All channels of v8 by the keys of a step: what are rows to the copy engine are channels.
template <class Tile>
hopper::TensorMapSpec values_map_e4m3(const QuantizeE4m3& q) {
  const int64_t head = static_cast<int64_t>(q.d) * q.padded_keys;
  return hopper::bytes_map({q.v8, q.G * head, q.padded_keys, head}, q.B, q.d, q.G, q.padded_keys,
                           kKeys, Tile::kChannels);
}

}  // namespace pixeldiff::attention
