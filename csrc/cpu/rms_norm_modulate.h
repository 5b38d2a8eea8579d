#pragma once

#include "../rms_norm_modulate.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Runs the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The result does not depend on `threads`.
void rms_norm_modulate(const RmsNormModulateArgs& args, Isa isa, int threads);

// One variant each, on rows [begin, end) of the B * N. scratch: 3 * D floats.
namespace portable {
void rms_norm_modulate_rows(const RmsNormModulateArgs&, int64_t, int64_t, float*);
}
namespace avx2 {
void rms_norm_modulate_rows(const RmsNormModulateArgs&, int64_t, int64_t, float*);
}
namespace avx512 {
void rms_norm_modulate_rows(const RmsNormModulateArgs&, int64_t, int64_t, float*);
}

}  // namespace pixeldiff::cpu
