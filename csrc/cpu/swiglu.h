#pragma once

#include "../swiglu.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Runs the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The result does not depend on `threads`.
void swiglu(const SwigluArgs& args, Isa isa, int threads);

// One variant each, on rows [begin, end) of the B * N. No scratch.
namespace portable {
void swiglu_rows(const SwigluArgs&, int64_t, int64_t, float*);
}
namespace avx2 {
void swiglu_rows(const SwigluArgs&, int64_t, int64_t, float*);
}
namespace avx512 {
void swiglu_rows(const SwigluArgs&, int64_t, int64_t, float*);
}

}  // namespace pixeldiff::cpu
