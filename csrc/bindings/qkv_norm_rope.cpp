#include "bindings.h"

#ifdef PIXELDIFF_SM90
#include "../cuda/qkv_norm_rope.h"
#include "arguments.h"

namespace py = pybind11;

namespace pixeldiff {
namespace {

using ProjectionSizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // B, K, G, d
using MatrixTuple = std::tuple<Address, int64_t>;                        // data, stride over rows
// rows, x, weight, q_weight, k_weight, cos, sin
using QkvStreamTuple =
    std::tuple<int64_t, RowsTuple, MatrixTuple, Address, Address, MatrixTuple, MatrixTuple>;

QkvStream to_stream(const QkvStreamTuple& tuple) {
  const auto& [rows, x, weight, q_weight, k_weight, cos, sin] = tuple;
  if (rows < 0) throw std::invalid_argument("sizes must not be negative");
  if (rows == 0) return {};
  return {rows,
          to_rows("x", x),
          to_output("weight", std::get<0>(weight)),
          std::get<1>(weight),
          to_output("q_weight", q_weight),
          to_output("k_weight", k_weight),
          to_pointer<float>("cos", std::get<0>(cos)),
          to_pointer<float>("sin", std::get<0>(sin)),
          std::get<1>(cos),
          std::get<1>(sin)};
}

void qkv_norm_rope_cuda(ProjectionSizes sizes, int dtype, const QkvStreamTuple& text,
                        const QkvStreamTuple& image, Address out, float eps, int device,
                        Address stream) {
  const auto [B, K, G, d] = sizes;
  if (B < 0 || K < 1 || G < 0)
    throw std::invalid_argument("sizes must not be negative, and there must be a channel");
  if (d != 64 && d != 72 && d != 128) throw std::invalid_argument("d must be 64, 72 or 128");
  const QkvNormRopeArgs args{
      B, K, G, d, to_dtype(dtype), to_stream(text), to_stream(image), to_output("out", out), eps};
  if (args.dtype == DType::f32) throw std::invalid_argument("fp32 has no such kernel");
  if (B == 0 || G == 0 || args.text.rows + args.image.rows == 0) return;
  py::gil_scoped_release unlocked;
  cuda::qkv_norm_rope(args, device, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_qkv_norm_rope(py::module_& m) { m.def("qkv_norm_rope_cuda", &qkv_norm_rope_cuda); }

}  // namespace pixeldiff
#endif
