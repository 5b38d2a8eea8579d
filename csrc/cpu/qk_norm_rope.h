#pragma once

#include "../qk_norm_rope.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Runs the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The result does not depend on `threads`.
void qk_norm_rope(const QkNormRopeArgs& args, Isa isa, int threads);

// One variant each, on rows [begin, end) of the B * (text rows + image rows). scratch: 10 * d
// floats.
namespace portable {
void qk_norm_rope_rows(const QkNormRopeArgs&, int64_t, int64_t, float*);
}
namespace avx2 {
void qk_norm_rope_rows(const QkNormRopeArgs&, int64_t, int64_t, float*);
}
namespace avx512 {
void qk_norm_rope_rows(const QkNormRopeArgs&, int64_t, int64_t, float*);
}

}  // namespace pixeldiff::cpu
