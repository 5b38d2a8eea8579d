// o = softmax(scale * q k^T) v for every image and head, one pass over the keys.
//
// FLOPs: 4 * B*G*L*S*d, and B*G*L*S exponentials. Compute-bound: the floor is those FLOPs at the
// processor's fused multiply-add rate (two 512-bit ones per clock on a server core: 64 FLOP per
// clock in fp32, 128 for pairs of bf16). On one Zen 5 core at 3.9 GHz, busy with other work, d 64
// and 72 reach 73 % of that in fp32 (183 of 250 GFLOP/s) and 68 % in bf16 (340 of 500); the inner
// loop alone, on data in the first-level cache, 91 % and 87 %.
//
// Layout: a vector holds 16 or 8 queries, never channels or keys. The maximum, the exponential, the
// sum and the rescaling of a softmax row are then plain vector operations without a reduction over
// lanes, and head dims such as 72 waste nothing. Both products are the same loop: kRows x kVecs
// accumulators, one broadcast per row and one load per vector for kRows * kVecs multiply-adds.
//
//   work item   kAttentionQueries queries of one head; q^T and o^T of all of them in scratch
//   block       kKeys keys and values, copied once per work item (converted, padded, adjacent)
//   tile        kTile queries: logits^T (kKeys, kTile), which stay in the first-level cache
//
// Storage is widened to fp32 when it is copied, except bf16 where the processor multiplies pairs of
// bf16 into fp32 (AVX512-BF16): those products are exact, and the weights are rounded to bf16 as in
// PyTorch's flash attention. Maximum, exponential and sum are fp32 everywhere.
//
// Keys that a mask leaves out are never packed, and so neither read nor computed.
//
// A row whose logits are all -inf, or that has none, gives 0; NaN or +inf among the logits gives a
// row of NaN.
// Compiled once per instruction set (see simd.h).
#include "joint_attention.h"

#include "exp2.h"
#include "products.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

// Accumulators, the loaded vectors and one broadcast fill the registers: 32 of AVX-512, 16 of AVX2.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVecs = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4, kVecs = 3;
#else
constexpr int kRows = 4, kVecs = 1;
#endif
constexpr int64_t kTile = kVecs * Vec::width;
static_assert(kAttentionQueries % kTile == 0 && kTile <= kAttentionTile &&
              kAttentionRows % kRows == 0);

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Arithmetic in fp32.
struct Fp32 : Fp32Products {
  static constexpr int64_t kKeys = 128;

  // out[0..padded) = row[0..d), then zeros
  template <class T>
  static void pack_row(const T* row, int64_t d, int64_t padded, Element* out) {
    for (int64_t i = 0; i < d; i += Vec::width) {
      const int64_t n = min_of(d - i, Vec::width);
      store_n(load_n(row + i, n), out + i, n);
    }
    for (int64_t i = d; i < padded; ++i) out[i] = 0;
  }
  // Rows offsets[0..keys) of `rows`
  template <class T>
  static void pack_values(const T* rows, const int64_t* offsets, int64_t keys, int64_t d,
                          int64_t padded, Element* out) {
    for (int64_t s = 0; s < keys; ++s) pack_row(rows + offsets[s], d, padded, out + s * padded);
  }
};

#if defined(__AVX512BF16__)
// Arithmetic of bf16 pairs.
struct Bf16Pairs : Bf16PairProducts {
  static constexpr int64_t kKeys = 128;

  // Lane i: a[i] in the low half, b[i] in the high half.
  static Operand join(Vec a, Vec b) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
  }

  static void pack_row(const bf16* row, int64_t d, int64_t padded, Element* out) {
    out[padded - 1] = 0;
    memcpy(out, row, (size_t)d * sizeof(bf16));
  }
  static void pack_values(const bf16* rows, const int64_t* offsets, int64_t keys, int64_t d,
                          int64_t padded, Element* out) {
    for (int64_t s = 0; s < keys; s += 2, out += padded) {
      const bf16* low = rows + offsets[s];
      if (s + 1 < keys) {
        const bf16* high = rows + offsets[s + 1];
        for (int64_t i = 0; i < d; ++i) out[i] = low[i].bits | (uint32_t)high[i].bits << 16;
      } else {
        for (int64_t i = 0; i < d; ++i) out[i] = low[i].bits;
      }
      for (int64_t i = d; i < padded; ++i) out[i] = 0;
    }
  }
};
#endif

// acc[r][v] += sum over i < count of b[r * row_stride + i * step] * a[i][v]
template <class A, int V>
static inline void multiply(const typename A::Element* a,  // (count, V * width)
                            const typename A::Element* b, int64_t row_stride, int64_t step,
                            int64_t count, Vec (&acc)[kRows][V]) {
  for (int64_t i = 0; i < count; ++i, a += V * Vec::width, b += step) {
    typename A::Operand lanes[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) lanes[v] = A::load(a + v * Vec::width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename A::Operand one = A::fill(b[r * row_stride]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = A::multiply_add(lanes[v], one, acc[r][v]);
    }
  }
}

// The softmax rows of V vectors of queries, and where they are kept between blocks.
struct Tile {
  void* q;         // (elements of d, V * width)
  float* o;        // (d padded, V * width), not yet divided by the sum
  float* max;      // (V * width), of the logits so far, in units of log 2
  float* sum;      // (V * width), of 2^(logit - max)
  float* missing;  // (V * width), what rounding took from the sum
};

// Scales `rows` rows of logits to units of log 2, stores them and raises `largest` to their
// maximum. Not more than that may live across `multiply`: its registers are all taken.
template <int V>
static inline void store_logits(const Vec (&acc)[kRows][V], int64_t rows, float factor,
                                float* logits, float* largest) {
  Vec most[V];
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) most[v] = Vec::load(largest + v * Vec::width);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const Vec x = acc[r][v] * Vec::fill(factor);
      most[v] = Vec::max(x, most[v]);
      x.store(logits + (r * V + v) * Vec::width);
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) most[v].store(largest + v * Vec::width);
}

// Logits of one block; `largest` (V * width) becomes the maximum of itself and them. Not inlined:
// constants of the surrounding loops would take registers from `multiply`.
template <class A, int V>
__attribute__((noinline)) static void block_logits(const typename A::Element* q,
                                                   const typename A::Element* k, int64_t depth,
                                                   int64_t keys, float scale, float* logits,
                                                   float* largest) {
  const float factor = scale * 1.44269504088896341f;
  for (int64_t s = 0; s < keys; s += kRows) {
    Vec acc[kRows][V];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[r][v] = Vec::zero();
    multiply<A, V>(q, k + s * depth, depth, 1, depth, acc);
    float* out = logits + s * V * Vec::width;
    if (keys - s >= kRows)
      store_logits<V>(acc, kRows, factor, out, largest);
    else  // the last rows are padding
      store_logits<V>(acc, keys - s, factor, out, largest);
  }
}

// Weights 2^(logit - most) of 8 keys at logits[r * stride], and their sum as a tree: where all
// weights are nearly 1, adding them one by one would round the same way every time.
static inline Vec weigh(Fp32, const float* logits, int64_t stride, Vec most, float* out) {
  Vec w[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    w[r] = exp2_nonpositive(Vec::load(logits + r * stride) - most);
    w[r].store(out + r * stride);
  }
  return ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7]));
}
static inline Vec weigh_tail(Fp32, const float* logits, int64_t stride, int64_t keys, Vec most,
                             float* out) {
  Vec sum = Vec::zero();
  for (int64_t r = 0; r < keys; ++r) {
    const Vec w = exp2_nonpositive(Vec::load(logits + r * stride) - most);
    w.store(out + r * stride);
    sum = sum + w;
  }
  return sum;
}

#if defined(__AVX512BF16__)
static inline Vec weigh(Bf16Pairs, const float* logits, int64_t stride, Vec most, float* out) {
  Vec w[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) w[r] = exp2_nonpositive(Vec::load(logits + r * stride) - most);
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
    _mm512_storeu_si512(out + r * stride, Bf16Pairs::join(w[2 * r], w[2 * r + 1]));
  return ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7]));
}
static inline Vec weigh_tail(Bf16Pairs, const float* logits, int64_t stride, int64_t keys, Vec most,
                             float* out) {
  Vec sum = Vec::zero();
  for (int64_t r = 0; r < keys; r += 2) {
    const Vec low = exp2_nonpositive(Vec::load(logits + r * stride) - most);
    Vec high = Vec::zero();
    if (r + 1 < keys) high = exp2_nonpositive(Vec::load(logits + (r + 1) * stride) - most);
    _mm512_storeu_si512(out + r / 2 * stride, Bf16Pairs::join(low, high));
    sum = sum + (low + high);
  }
  return sum;
}
#endif

// Replaces the logits of one vector of queries by their weights, as elements (those of key pair i
// overwrite logits i, which have been read), and returns the sum.
template <class A>
static inline Vec block_weights(float* logits, int64_t stride, int64_t keys, Vec most) {
  Vec sum = Vec::zero();
  int64_t s = 0;
  for (; s + 8 <= keys; s += 8)
    sum = sum + weigh(A(), logits + s * stride, stride, most, logits + s / A::kFold * stride);
  if (s < keys)
    sum = sum + weigh_tail(A(), logits + s * stride, stride, keys - s, most,
                           logits + s / A::kFold * stride);
  return sum;
}

// One block of keys into one tile of queries.
template <class A, int V>
static void attend(const Tile& tile, const float* k, const float* v, int64_t depth, int64_t padded,
                   int64_t keys, float scale, float* logits) {
  using Element = typename A::Element;
  constexpr int64_t kLanes = V * Vec::width;
  Vec before[V], rescale[V];
  for (int j = 0; j < V; ++j) before[j] = Vec::load(tile.max + j * Vec::width);
  block_logits<A, V>((const Element*)tile.q, (const Element*)k, depth, keys, scale, logits,
                     tile.max);
  for (int j = 0; j < V; ++j) {
    const int64_t lane = j * Vec::width;
    const Vec most = Vec::load(tile.max + lane);
    rescale[j] = exp2_nonpositive(before[j] - most);
    // Compensated: thousands of nearly equal blocks would all be rounded the same way.
    const Vec added = block_weights<A>(logits + lane, kLanes, keys, most) +
                      Vec::load(tile.missing + lane) * rescale[j];
    const Vec sum = Vec::load(tile.sum + lane) * rescale[j];
    const Vec total = sum + added;
    total.store(tile.sum + lane);
    (added - (total - sum)).store(tile.missing + lane);
  }

  for (int64_t c = 0; c < padded; c += kRows) {
    float* o = tile.o + c * kLanes;
    Vec acc[kRows][V];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int j = 0; j < V; ++j)
        acc[r][j] = Vec::load(o + r * kLanes + j * Vec::width) * rescale[j];
    multiply<A, V>((const Element*)logits, (const Element*)v + c, 1, padded,
                   (keys + A::kFold - 1) / A::kFold, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int j = 0; j < V; ++j) acc[r][j].store(o + r * kLanes + j * Vec::width);
  }
}

template <class A>
static void attend(int64_t vecs, const Tile& tile, const float* k, const float* v, int64_t depth,
                   int64_t padded, int64_t keys, float scale, float* logits) {
  if (vecs == 1) attend<A, 1>(tile, k, v, depth, padded, keys, scale, logits);
#if defined(__AVX2__)
  if (vecs == 2) attend<A, 2>(tile, k, v, depth, padded, keys, scale, logits);
  if (vecs == 3) attend<A, 3>(tile, k, v, depth, padded, keys, scale, logits);
#endif
}

// q^T of `count` queries, zeros in the lanes that have none; nothing accumulated yet.
template <class A, class T>
static void open_tile(const T* q, int64_t stride, int64_t count, int64_t lanes, int64_t d,
                      int64_t depth, int64_t padded, float* row, const Tile& tile) {
  using Element = typename A::Element;
  Element* out = (Element*)tile.q;
  memset(out, 0, (size_t)(depth * lanes) * sizeof(Element));
  for (int64_t j = 0; j < count; ++j) {
    A::pack_row(q + j * stride, d, depth, (Element*)row);
    for (int64_t c = 0; c < depth; ++c) out[c * lanes + j] = ((const Element*)row)[c];
  }
  memset(tile.o, 0, (size_t)(padded * lanes) * sizeof(float));
  for (int64_t j = 0; j < lanes; ++j) {
    tile.max[j] = -__FLT_MAX__;  // finite, so that a block of logits that are all -inf weighs 0
    tile.sum[j] = 0;
    tile.missing[j] = 0;
  }
}

// `lse` holds one number for every `lse_stride`; may be nullptr.
template <class T>
static void close_tile(const Tile& tile, int64_t count, int64_t lanes, int64_t d, float* row, T* o,
                       int64_t stride, float* lse, int64_t lse_stride) {
  for (int64_t j = 0; j < count; ++j) {
    // The maximum of a row without keys is finite; the logarithm of its sum is not.
    if (lse)
      lse[j * lse_stride] = tile.max[j] * 0.693147180559945309f + __builtin_logf(tile.sum[j]);
    const float inverse = tile.sum[j] == 0 ? 0 : 1 / tile.sum[j];
    for (int64_t c = 0; c < d; ++c) row[c] = tile.o[c * lanes + j] * inverse;
    for (int64_t c = 0; c < d; c += Vec::width) {
      const int64_t n = min_of(d - c, Vec::width);
      store_n(load_n(row + c, n), o + j * stride + c, n);
    }
  }
}

// The next `most` keys that take part, from `s` on, which moves past them: offsets of their rows in
// k and v. Returns their number.
static inline int64_t next_keys(const JointAttentionArgs& a, const uint8_t* mask, int64_t most,
                                int64_t& s, int64_t* k, int64_t* v) {
  int64_t keys = 0;
  for (; s < a.S && keys < most; ++s) {
    if (mask && !mask[s]) continue;
    k[keys] = s * a.k.stride_n;
    v[keys++] = s * a.v.stride_n;
  }
  return keys;
}

template <class A, class T>
static void run_item(const JointAttentionArgs& a, int64_t item, const AttentionScratch& scratch) {
  using Element = typename A::Element;
  const int64_t per_head = (a.L + kAttentionQueries - 1) / kAttentionQueries;
  const int64_t b = item / per_head / a.G, g = item / per_head % a.G;
  const int64_t first = item % per_head * kAttentionQueries;
  const int64_t queries = min_of(a.L - first, kAttentionQueries);
  const int64_t depth = (a.d + A::kFold - 1) / A::kFold;
  const int64_t padded = ceil_to(a.d, kRows);

  const T* q = (const T*)a.q.data + b * a.q.stride_b + first * a.q.stride_n + g * a.q.stride_g;
  const T* k = (const T*)a.k.data + b * a.k.stride_b + g * a.k.stride_g;
  const T* v = (const T*)a.v.data + b * a.v.stride_b + g * a.v.stride_g;
  T* o = (T*)a.o + ((b * a.L + first) * a.G + g) * a.d;

  const auto tile_at = [&](int64_t l) {
    return Tile{(Element*)scratch.q + l * depth, scratch.o + l * padded, scratch.max + l,
                scratch.sum + l, scratch.missing + l};
  };
  const auto lanes_at = [&](int64_t l) { return ceil_to(min_of(queries - l, kTile), Vec::width); };
  for (int64_t l = 0; l < queries; l += kTile)
    open_tile<A>(q + l * a.q.stride_n, a.q.stride_n, min_of(queries - l, kTile), lanes_at(l), a.d,
                 depth, padded, scratch.row, tile_at(l));
  const uint8_t* mask = a.key_mask ? a.key_mask + b * a.mask_stride_b : nullptr;
  int64_t k_offsets[A::kKeys], v_offsets[A::kKeys];
  for (int64_t s = 0; s < a.S;) {
    const int64_t keys = next_keys(a, mask, A::kKeys, s, k_offsets, v_offsets);
    if (keys == 0) break;
    Element* packed = (Element*)scratch.k;
    for (int64_t i = 0; i < keys; ++i)
      A::pack_row(k + k_offsets[i], a.d, depth, packed + i * depth);
    memset(packed + keys * depth, 0,
           (size_t)((ceil_to(keys, kRows) - keys) * depth) * sizeof(Element));
    A::pack_values(v, v_offsets, keys, a.d, padded, (Element*)scratch.v);
    for (int64_t l = 0; l < queries; l += kTile)
      attend<A>(lanes_at(l) / Vec::width, tile_at(l), scratch.k, scratch.v, depth, padded, keys,
                a.scale, scratch.logits);
  }
  for (int64_t l = 0; l < queries; l += kTile)
    close_tile(tile_at(l), min_of(queries - l, kTile), lanes_at(l), a.d, scratch.row,
               o + l * a.G * a.d, a.G * a.d,
               a.lse ? a.lse + (b * a.L + first + l) * a.G + g : nullptr, a.G);
}

void joint_attention_items(const JointAttentionArgs& a, int64_t begin, int64_t end,
                           const AttentionScratch& scratch) {
  for (int64_t item = begin; item < end; ++item) {
    if (a.dtype == DType::f32)
      run_item<Fp32, float>(a, item, scratch);
    else if (a.dtype == DType::f16)
      run_item<Fp32, f16>(a, item, scratch);
    else
#if defined(__AVX512BF16__)
      run_item<Bf16Pairs, bf16>(a, item, scratch);
#else
      run_item<Fp32, bf16>(a, item, scratch);
#endif
  }
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
