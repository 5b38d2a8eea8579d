#pragma once

#include "../gated_norm_residual.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Runs the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The result does not depend on `threads`.
void gated_norm_residual(const GatedNormResidualArgs& args, Isa isa, int threads);

// One variant each, on rows [begin, end) of the B * N. scratch: 2 * D floats.
namespace portable {
void gated_norm_residual_rows(const GatedNormResidualArgs&, int64_t, int64_t, float*);
}
namespace avx2 {
void gated_norm_residual_rows(const GatedNormResidualArgs&, int64_t, int64_t, float*);
}
namespace avx512 {
void gated_norm_residual_rows(const GatedNormResidualArgs&, int64_t, int64_t, float*);
}

}  // namespace pixeldiff::cpu
