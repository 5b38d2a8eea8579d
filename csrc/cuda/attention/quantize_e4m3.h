// What sm90_e4m3.h multiplies, made of q, k and v: e4m3 with scales, values transposed.
//
// M is the machine, as in sm90.h. Every number is made by one thread or by the lanes of a warp:
// the same bits in every run.
#pragma once

#include <cmath>

#include "../../joint_attention.h"
#include "../hopper/fragment.h"
#include "sm90_tile.h"

namespace pixeldiff::attention {

struct QuantizeE4m3 {
  int B, L, S, G, d;  // d is a multiple of 8, at most 128
  int steps;          // of kKeys keys
  int width;          // bytes of a row of q8 and k8: d to a multiple of 16
  int padded_keys;    // S to a multiple of 32
  Heads q, k, v;      // (B, L, G, d), (B, S, G, d) twice
  char* q8;           // (B, G, L, width)
  char* k8;           // (B, G, S, width), less the mean over the keys
  char* v8;           // (B, G, d, padded_keys), every 32 in the order of hopper::column_at
  float* q_scale;     // (B, G, L)
  float* k_scale;     // (B, G, steps)
  float* v_scale;     // (B, G, d)
  float* sums;        // (B, G, steps, d), of k over the keys of a step
  float* largest;     // (B, G, steps, d), of |v| over them
  float* mean;        // (B, G, d)
};

constexpr int kQuantizeThreads = 128;  // of a block
constexpr float kLargestE4m3 = 448.0f;

// NaN and infinity stay, and make NaN of everything that shares the scale.
PIXELDIFF_HOST_DEVICE float scale_e4m3(float largest) {
  return largest == 0.0f ? 1.0f : largest / kLargestE4m3;
}

template <class M, DType kType>
struct Quantizer {
  static constexpr int kSize = kType == DType::f32 ? 4 : 2;

  M& m;
  const QuantizeE4m3& p;

  PIXELDIFF_DEVICE int64_t index() const {
    return static_cast<int64_t>(m.block()) * kQuantizeThreads + m.thread();
  }
  PIXELDIFF_DEVICE static const char* at(const Heads& t, int64_t b, int64_t row, int64_t g,
                                         int64_t channel) {
    return static_cast<const char*>(t.data) +
           (b * t.stride_b + row * t.stride_n + g * t.stride_g + channel) * kSize;
  }

  // Two channels of a head over the keys of a step to a thread: neighbours read side by side.
  PIXELDIFF_DEVICE void statistics() {
    const int pairs = p.d / 2;
    int64_t i = index();
    const int channel = static_cast<int>(i % pairs) * 2;
    i /= pairs;
    const int g = static_cast<int>(i % p.G);
    i /= p.G;
    const int step = static_cast<int>(i % p.steps);
    const int64_t b = i / p.steps;
    if (b >= p.B) return;
    const int first = step * kKeys;
    const int last = p.S - first < kKeys ? p.S : first + kKeys;
    float sum[2] = {0.0f, 0.0f}, largest[2] = {0.0f, 0.0f};
    PIXELDIFF_UNROLL_BY(8)
    for (int key = first; key < last; ++key) {
      float k[2], v[2];
      m.template load<kType>(at(p.k, b, key, g, channel), k);
      m.template load<kType>(at(p.v, b, key, g, channel), v);
      PIXELDIFF_UNROLL
      for (int c = 0; c < 2; ++c) {
        sum[c] += k[c];
        largest[c] = m.max(largest[c], fabsf(v[c]));
      }
    }
    const int64_t to = ((b * p.G + g) * p.steps + step) * p.d + channel;
    PIXELDIFF_UNROLL
    for (int c = 0; c < 2; ++c) {
      m.store(p.sums + to + c, sum[c]);
      m.store(p.largest + to + c, largest[c]);
    }
  }

  // A channel of a head to a thread.
  PIXELDIFF_DEVICE void totals() {
    const int64_t i = index();
    const int64_t head = i / p.d;
    if (head >= static_cast<int64_t>(p.B) * p.G) return;
    int64_t from = head * p.steps * p.d + i % p.d;
    float sum = 0.0f, largest = 0.0f;
    PIXELDIFF_UNROLL_BY(8)
    for (int step = 0; step < p.steps; ++step, from += p.d) {
      sum += m.load(p.sums + from);
      largest = m.max(largest, m.load(p.largest + from));
    }
    m.store(p.mean + i, sum / static_cast<float>(p.S));
    m.store(p.v_scale + i, scale_e4m3(largest));
  }

  // A row of queries to 8 or 16 lanes, 8 channels to a lane.
  template <int kLanes>
  PIXELDIFF_DEVICE void queries() {
    const int channel = m.thread() % kLanes * 8;
    int64_t i = index() / kLanes;
    const bool inside = i < static_cast<int64_t>(p.B) * p.L * p.G;
    const int64_t g = i % p.G;
    i /= p.G;
    const int64_t row = i % p.L, b = i / p.L;
    float x[8] = {};
    if (inside && channel < p.d) m.template load<kType>(at(p.q, b, row, g, channel), x);
    const float scale = scale_e4m3(over_lanes<kLanes>(largest_of(x)));
    if (!inside) return;
    const int64_t to = (b * p.G + g) * p.L + row;
    write(p.q8 + to * p.width, channel, x, 1.0f / scale);
    if (channel == 0) m.store(p.q_scale + to, scale);
  }

  // The keys of a step of a head to a warp, a row of them to 8 or 16 lanes.
  template <int kLanes>
  PIXELDIFF_DEVICE void keys() {
    constexpr int kRows = 32 / kLanes;
    const int lane = m.thread() % 32;
    const int channel = lane % kLanes * 8;
    const int64_t i = index() / 32;
    const int64_t head = i / p.steps;
    const int step = static_cast<int>(i % p.steps);
    if (head >= static_cast<int64_t>(p.B) * p.G) return;
    const int64_t b = head / p.G, g = head % p.G;
    const int first = step * kKeys + lane / kLanes;
    const int last = p.S - step * kKeys < kKeys ? p.S : (step + 1) * kKeys;
    float mean[8] = {};
    if (channel < p.d) {
      PIXELDIFF_UNROLL
      for (int c = 0; c < 8; ++c) mean[c] = m.load(p.mean + head * p.d + channel + c);
    }
    float x[8] = {};
    const auto read = [&](int key) {
      if (channel >= p.d) return;
      m.template load<kType>(at(p.k, b, key, g, channel), x);
      PIXELDIFF_UNROLL
      for (int c = 0; c < 8; ++c) x[c] -= mean[c];
    };
    float largest = 0.0f;
    PIXELDIFF_UNROLL_BY(4)
    for (int key = first; key < last; key += kRows) {
      read(key);
      largest = m.max(largest, largest_of(x));
    }
    const float scale = scale_e4m3(over_lanes<32>(largest));
    const float inverse = 1.0f / scale;
    // From the cache.
    PIXELDIFF_UNROLL_BY(4)
    for (int key = first; key < last; key += kRows) {
      read(key);
      write(p.k8 + (head * p.S + key) * p.width, channel, x, inverse);
    }
    if (lane == 0) m.store(p.k_scale + head * p.steps + step, scale);
  }

  // 32 keys of a channel to a thread: neighbours read side by side, and write 32 bytes each.
  PIXELDIFF_DEVICE void values() {
    const int groups = p.padded_keys / 32;
    int64_t i = index();
    const int channel = static_cast<int>(i % p.d);
    i /= p.d;
    const int first = static_cast<int>(i % groups) * 32;
    const int64_t head = i / groups;
    if (head >= static_cast<int64_t>(p.B) * p.G) return;
    const int64_t b = head / p.G, g = head % p.G;
    const float inverse = 1.0f / m.load(p.v_scale + head * p.d + channel);
    char* out = p.v8 + (head * p.d + channel) * p.padded_keys + first;
    float x[32];
    PIXELDIFF_UNROLL
    for (int key = 0; key < 32; ++key) {
      float one[1] = {0.0f};
      if (first + key < p.S) m.template load<kType>(at(p.v, b, first + key, g, channel), one);
      // Not 0 times what may be infinite.
      x[key] = first + key < p.S ? one[0] * inverse : 0.0f;
    }
    PIXELDIFF_UNROLL
    for (int position = 0; position < 32; position += 8) {
      uint32_t words[2];
      PIXELDIFF_UNROLL
      for (int w = 0; w < 2; ++w) {
        const int from = position + 4 * w;
        words[w] = m.pack_e4m3(x[hopper::column_at(from)], x[hopper::column_at(from + 1)],
                               x[hopper::column_at(from + 2)], x[hopper::column_at(from + 3)]);
      }
      m.store(out + position, words[0], words[1]);
    }
  }

 private:
  PIXELDIFF_DEVICE float largest_of(const float (&x)[8]) const {
    float largest = 0.0f;
    PIXELDIFF_UNROLL
    for (int c = 0; c < 8; ++c) largest = m.max(largest, fabsf(x[c]));
    return largest;
  }
  template <int kLanes>
  PIXELDIFF_DEVICE float over_lanes(float largest) const {
    PIXELDIFF_UNROLL
    for (int lanes = 1; lanes < kLanes; lanes *= 2)
      largest = m.max(largest, m.shuffle_xor(largest, lanes));
    return largest;
  }
  // Channels past a head's are 0.
  PIXELDIFF_DEVICE void write(char* row, int channel, const float (&x)[8], float inverse) const {
    if (channel >= p.width) return;
    float y[8];
    PIXELDIFF_UNROLL
    for (int c = 0; c < 8; ++c) y[c] = channel < p.d ? x[c] * inverse : 0.0f;
    m.store(row + channel, m.pack_e4m3(y[0], y[1], y[2], y[3]),
            m.pack_e4m3(y[4], y[5], y[6], y[7]));
  }
};

}  // namespace pixeldiff::attention
