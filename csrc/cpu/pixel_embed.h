#pragma once

#include "../pixel_embed.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Runs the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The result does not depend on `threads`.
void pixel_embed(const PixelEmbedArgs& args, Isa isa, int threads);

// One variant each, on image rows [begin, end).
namespace portable {
void pixel_embed_rows(const PixelEmbedArgs&, int64_t, int64_t);
}
namespace avx2 {
void pixel_embed_rows(const PixelEmbedArgs&, int64_t, int64_t);
}
namespace avx512 {
void pixel_embed_rows(const PixelEmbedArgs&, int64_t, int64_t);
}

}  // namespace pixeldiff::cpu
