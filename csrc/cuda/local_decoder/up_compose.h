// Makes the weights that up.h multiplies by (up_weights.h): a block for each fragment and one for
// the biases. In fp32, with one rounding, which replaces that of u.
//
// Level 0 of L2P: 74 blocks, 2.4 M multiply-adds; level 1: 147 and 9.4 M.
#pragma once

#include <cmath>

#include "../local_decoder_up.h"
#include "up_weights.h"

namespace pixeldiff::local_decoder {

struct ComposeParams {
  int Ci, Cu, Cs;
  cuda::Taps up_weight, weight;
  const char* up_bias;
  const char* bias;
  Weights layout;
  char* to;

  PIXELDIFF_HOST_DEVICE constexpr int x_fragments() const {
    return kParities * kSlots * layout.x_blocks;
  }
  PIXELDIFF_HOST_DEVICE constexpr int fragments() const {
    return x_fragments() + layout.skip_fragments();
  }
  PIXELDIFF_HOST_DEVICE constexpr int blocks() const { return fragments() + 1; }
};

template <class M>
struct Compose {
  static constexpr int kThreads = 128;  // two channels of the first operand by one of the result
  // First convolution's taps, summed where they meet the same of x, then the second's.
  static constexpr uint32_t kHalf = 9 * kMaxMiddle * 16 * 4;
  static constexpr uint32_t kSharedBytes = 2 * kHalf;

  M& m;
  const ComposeParams& p;

  PIXELDIFF_DEVICE void run() {
    const int i = m.block();
    if (i < p.x_fragments()) {
      compose(i / p.layout.x_blocks / kSlots, i / p.layout.x_blocks % kSlots,
              i % p.layout.x_blocks);
    } else if (i < p.fragments()) {
      const int fragment = i - p.x_fragments();
      if (p.layout.skip_blocks == 0)
        pack(fragment / 3, fragment % 3);
      else
        copy(fragment);
    } else {
      add_biases();
    }
  }

 private:
  PIXELDIFF_DEVICE static uint32_t at(int tap, int middle, int c) {
    return ((tap * kMaxMiddle + middle) * 16 + c) * 4;
  }
  PIXELDIFF_DEVICE float load(const cuda::Taps& t, int n, int c, int r, int s) {
    float x[1];
    m.template load<DType::bf16, 1>(
        static_cast<const char*>(t.data) +
            2 * (n * t.stride_n + c * t.stride_c + r * t.stride_r + s * t.stride_s),
        x);
    return x[0];
  }
  PIXELDIFF_DEVICE float load(const char* vector, int i) {
    float x[1];
    m.template load<DType::bf16, 1>(vector + 2 * i, x);
    return x[0];
  }

  PIXELDIFF_DEVICE void compose(int parity, int number, int block) {
    const int a = parity / 2, b = parity % 2;
    const Slot slot = local_decoder::slot(number);
    const int c = m.thread() % 16, ci = 16 * block + c;
    for (int middle = m.thread() / 16; middle < p.Cu; middle += kThreads / 16) {
      float taps[9];
      PIXELDIFF_UNROLL
      for (int i = 0; i < 9; ++i) {
        taps[i] = ci < p.Ci ? load(p.up_weight, middle, ci, i / 3, i % 3) : 0.0f;
        m.put(kHalf + at(i, middle, c), load(p.weight, c, middle, i / 3, i % 3));
      }
      PIXELDIFF_UNROLL
      for (int i = 0; i < 9; ++i) {
        float sum = 0.0f;
        PIXELDIFF_UNROLL
        for (int j = 0; j < 9; ++j)
          if (meets(a, i / 3, j / 3, slot.ey) && meets(b, i % 3, j % 3, slot.ex)) sum += taps[j];
        m.put(at(i, middle, c), sum);
      }
    }
    m.sync_block();

    const int k = m.thread() / 16 * 2, channel = c;
    float low = 0.0f, high = 0.0f;
    for (int i = 0; i < 9; ++i) {
      if (!kept(slot.edge_y, a, i / 3) || !kept(slot.edge_x, b, i % 3)) continue;
      for (int middle = 0; middle < p.Cu; ++middle) {
        const float weight = m.get(kHalf + at(i, middle, channel));
        low = fmaf(m.get(at(i, middle, k)), weight, low);
        high = fmaf(m.get(at(i, middle, k + 1)), weight, high);
      }
    }
    store(p.layout.x(parity, number, block), k, channel, low, high);
  }

  PIXELDIFF_DEVICE void copy(int fragment) {
    const int tap = fragment / p.layout.skip_blocks, block = fragment % p.layout.skip_blocks;
    const int k = m.thread() / 16 * 2, channel = m.thread() % 16, cs = 16 * block + k;
    float both[2];
    PIXELDIFF_UNROLL
    for (int i = 0; i < 2; ++i)
      both[i] = cs + i < p.Cs ? load(p.weight, channel, p.Cu + cs + i, tap / 3, tap % 3) : 0.0f;
    store(p.layout.skip(tap, block), k, channel, both[0], both[1]);
  }

  PIXELDIFF_DEVICE void pack(int b, int row) {
    const int k = m.thread() / 16 * 2, channel = m.thread() % 16;
    float both[2];
    PIXELDIFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int value = packed_value(b, k + i);
      both[i] = value >= 0 && value < 3 * kPackedChannels
                    ? load(p.weight, channel, p.Cu + value % kPackedChannels, row,
                           value / kPackedChannels)
                    : 0.0f;
    }
    store(p.layout.packed(b, row), k, channel, both[0], both[1]);
  }

  PIXELDIFF_DEVICE void store(int fragment, int k, int channel, float low, float high) {
    m.store(p.to + fragment + 2 * fragment_at(k, channel), m.template pack<true>(low, high));
  }

  PIXELDIFF_DEVICE void add_biases() {
    const int c = m.thread() % 16;
    for (int middle = m.thread() / 16; middle < p.Cu; middle += kThreads / 16) {
      const float up_bias = load(p.up_bias, middle);
      PIXELDIFF_UNROLL
      for (int i = 0; i < 9; ++i)
        m.put(at(i, middle, c), load(p.weight, c, middle, i / 3, i % 3) * up_bias);
    }
    m.sync_block();
    for (int i = m.thread(); i < 9 * kOut; i += kThreads) {
      float sum = 0.0f;
      for (int middle = 0; middle < p.Cu; ++middle) sum += m.get(at(i / kOut, middle, i % kOut));
      m.put(kHalf + at(i / kOut, 0, i % kOut), sum);
    }
    m.sync_block();
    for (int i = m.thread(); i < 4 * kParities * kOut; i += kThreads) {
      const int kind = i / kOut, channel = i % kOut;
      const int a = kind / 8, b = kind / 4 % 2;
      const bool edge_y = kind / 2 % 2, edge_x = kind % 2;
      float sum = load(p.bias, channel);
      PIXELDIFF_UNROLL
      for (int tap = 0; tap < 9; ++tap)
        if (kept(edge_y, a, tap / 3) && kept(edge_x, b, tap % 3))
          sum += m.get(kHalf + at(tap, 0, channel));
      m.store(reinterpret_cast<float*>(p.to + p.layout.shift(0, false, false)) + i, sum);
    }
  }
};

}  // namespace pixeldiff::local_decoder
