#pragma once

#include "../local_decoder.h"
#include "isa.h"

namespace pixeldiff::cpu {

// Runs the variant compiled for `isa` on `threads` threads at most; the caller has checked that
// `isa` is usable. The result does not depend on `threads`.
void local_decoder_down(const LocalDecoderDownArgs& args, Isa isa, int threads);

// Pixels of an image row that one strip works on: its rows stay in the second-level cache. A
// multiple of every variant's tile.
constexpr int64_t kDownPixels = 120;

// Where memory is cut; every part is aligned to 64 bytes and zero at first.
struct DownMemory {
  float* bias;     // shared by the workers
  float* weights;  // shared
  float* rows;     // (4, row) of x
  int64_t row;
  float* line[2];  // (kDownPixels, Co)
};

// `prepare` packs the weights. `strips` does pairs of image rows [begin, end) of the
// B * ceil(W / kDownPixels) * H/2, those of a strip of columns one after the other.
#define PIXELDIFF_DECLARE(isa)                                                     \
  namespace isa {                                                                  \
  void local_decoder_down_prepare(const LocalDecoderDownArgs&, const DownMemory&); \
  void local_decoder_down_strips(const LocalDecoderDownArgs&, int64_t, int64_t,    \
                                 const DownMemory&);                               \
  }
PIXELDIFF_DECLARE(portable)
PIXELDIFF_DECLARE(avx2)
PIXELDIFF_DECLARE(avx512)
PIXELDIFF_DECLARE(avx512_bf16)
#undef PIXELDIFF_DECLARE

}  // namespace pixeldiff::cpu
