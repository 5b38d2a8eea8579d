#pragma once

#include "../local_decoder.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Runs the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The result does not depend on `threads`.
void local_decoder_up(const LocalDecoderUpArgs& args, Isa isa, int threads);

// Pixels of a row of y that one strip works on. Its u has two pixels more: 60 windows of x and 118
// of u are both about a multiple of every variant's tile.
constexpr int64_t kUpPixels = 118;
// Images that share a skip and are worked on together: the two branches of guidance.
constexpr int64_t kUpTogether = 2;

// Where memory is cut; every part is aligned to 64 bytes and zero at first.
struct UpMemory {
  float *up_bias, *bias;                      // shared by the workers
  float *up_weights, *u_weights, *s_weights;  // shared
  float *x, *u, *skip;                        // (kUpTogether, 2, .), (kUpTogether, 4, .), (4, .)
  int64_t x_row, u_row, skip_row;             // floats of a row
  float *line, *shared;                       // (kUpPixels, Co)
};

// `prepare` packs the weights. `strips` does pairs of image rows [begin, end) of the
// S * ceil(B/S / kUpTogether) * ceil(W / kUpPixels) * H/2, those of a strip of columns one after
// the other.
#define PIXELDIFF_DECLARE(isa)                                                                \
  namespace isa {                                                                             \
  void local_decoder_up_prepare(const LocalDecoderUpArgs&, const UpMemory&);                  \
  void local_decoder_up_strips(const LocalDecoderUpArgs&, int64_t, int64_t, const UpMemory&); \
  }
PIXELDIFF_DECLARE(portable)
PIXELDIFF_DECLARE(avx2)
PIXELDIFF_DECLARE(avx512)
PIXELDIFF_DECLARE(avx512_bf16)
#undef PIXELDIFF_DECLARE

}  // namespace pixeldiff::cpu
