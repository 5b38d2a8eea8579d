// y = a * sigmoid(a) * b, row by row; a and b may be the halves of one projection.
//
// Bytes: 3 * B*N*D * sizeof(a). FLOPs: about 25 * B*N*D, one division among them. Bandwidth-bound
// from memory, bound by the exponential from the caches.
//
// fp32 inside, one rounding at the end. Compiled once per instruction set (see simd.h).
#include "swiglu.h"

#include "exponential.h"

namespace pixeldiff::cpu::PIXELDIFF_ISA {

template <class T>
static void row(const T* a, const T* b, int64_t D, T* y) {
  constexpr int W = Vec::width;
  int64_t i = 0;
  for (; i + W <= D; i += W) (silu(Vec::load(a + i)) * Vec::load(b + i)).store(y + i);
  if (i < D) {
    const int64_t n = D - i;
    store_tail(silu(load_tail(a + i, n)) * load_tail(b + i, n), y + i, n);
  }
}

template <class T>
static void rows(const SwigluArgs& g, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / g.N, n = r % g.N;
    row((const T*)g.a.data + b * g.a.stride_b + n * g.a.stride_n,
        (const T*)g.b.data + b * g.b.stride_b + n * g.b.stride_n, g.D, (T*)g.y + r * g.D);
  }
}

void swiglu_rows(const SwigluArgs& args, int64_t begin, int64_t end, float*) {
  if (args.dtype == DType::f32)
    rows<float>(args, begin, end);
  else if (args.dtype == DType::bf16)
    rows<bf16>(args, begin, end);
  else
    rows<f16>(args, begin, end);
}

}  // namespace pixeldiff::cpu::PIXELDIFF_ISA
