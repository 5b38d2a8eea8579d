#pragma once

#include "../joint_attention.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Runs the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The result does not depend on `threads`.
void joint_attention(const JointAttentionArgs& args, Isa isa, int threads);

// Queries of one work item: every variant's tile divides it. So many share a packed block of keys
// that fetching and packing it takes 5 to 10 % of the time (192: twice that), and few enough that a
// head of 4096 queries makes eleven items.
constexpr int64_t kAttentionQueries = 384;
constexpr int64_t kAttentionKeys = 128;  // most keys packed at a time
constexpr int64_t kAttentionTile = 48;   // most queries whose logits are held at a time
constexpr int64_t kAttentionRows = 8;    // head dims are padded to a multiple of this or less

// Where one worker's scratch is cut, in floats; `data` is aligned to 64 bytes.
struct AttentionScratch {
  float *q, *o, *max, *sum, *missing, *k, *v, *logits, *row;
};

// Work items [begin, end) of the B * G * ceil(L / kAttentionQueries).
namespace portable {
void joint_attention_items(const JointAttentionArgs&, int64_t, int64_t, const AttentionScratch&);
}
namespace avx2 {
void joint_attention_items(const JointAttentionArgs&, int64_t, int64_t, const AttentionScratch&);
}
namespace avx512 {
void joint_attention_items(const JointAttentionArgs&, int64_t, int64_t, const AttentionScratch&);
}
namespace avx512_bf16 {
void joint_attention_items(const JointAttentionArgs&, int64_t, int64_t, const AttentionScratch&);
}

}  // namespace pixeldiff::cpu
