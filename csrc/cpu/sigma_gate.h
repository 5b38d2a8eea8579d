#pragma once

#include "../sigma_gate.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Run the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The results do not depend on `threads`.
void sigma_gate_per_token(const SigmaGatePerTokenArgs& args, Isa isa, int threads);
void sigma_gate_per_channel(const SigmaGatePerChannelArgs& args, Isa isa, int threads);

// One variant each, on rows [begin, end) of the B * N. Scratch: D floats per token, none per
// channel.
namespace portable {
void sigma_gate_per_token_rows(const SigmaGatePerTokenArgs&, int64_t, int64_t, float*);
void sigma_gate_per_channel_rows(const SigmaGatePerChannelArgs&, int64_t, int64_t, float*);
}  // namespace portable
namespace avx2 {
void sigma_gate_per_token_rows(const SigmaGatePerTokenArgs&, int64_t, int64_t, float*);
void sigma_gate_per_channel_rows(const SigmaGatePerChannelArgs&, int64_t, int64_t, float*);
}  // namespace avx2
namespace avx512 {
void sigma_gate_per_token_rows(const SigmaGatePerTokenArgs&, int64_t, int64_t, float*);
void sigma_gate_per_channel_rows(const SigmaGatePerChannelArgs&, int64_t, int64_t, float*);
}  // namespace avx512

}  // namespace pixeldiff::cpu
