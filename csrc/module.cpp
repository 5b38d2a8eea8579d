// pixeldiff._C: pointers, sizes and strides in, nothing returned. The Python side owns every tensor
// and has checked shapes and dtypes; what is checked again here is what guards memory.
#include <pybind11/pybind11.h>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "build_info.h"
#include "cpu/gated_residual_norm.h"
#include "cpu/isa.h"
#include "cpu/rms_norm_modulate.h"
#include "interface.h"
#ifdef PIXELDIFF_CUDA
#include "cuda/gated_residual_norm.h"
#include "cuda/rms_norm_modulate.h"
#endif

namespace py = pybind11;

namespace pixeldiff {
namespace {

RmsNormModulateArgs rms_norm_modulate_args(Sizes sizes, int dtype, RowsTuple x, VectorTuple weight,
                                           VectorTuple scale, VectorTuple shift, Address y,
                                           float eps) {
  const auto [B, N, D] = sizes;
  return {B,
          N,
          D,
          to_dtype(dtype),
          to_rows("x", x),
          to_vector("weight", weight),
          to_vector("scale", scale),
          to_vector("shift", shift, true),
          to_output("y", y),
          eps};
}

GatedResidualNormArgs gated_residual_norm_args(Sizes sizes, int dtype, RowsTuple x, RowsTuple y,
                                               VectorTuple gate, VectorTuple weight,
                                               VectorTuple scale, VectorTuple shift, Address x_new,
                                               Address h, float eps) {
  const auto [B, N, D] = sizes;
  return {B,
          N,
          D,
          to_dtype(dtype),
          to_rows("x", x),
          to_rows("y", y),
          to_vector("gate", gate),
          to_vector("weight", weight),
          to_vector("scale", scale),
          to_vector("shift", shift, true),
          to_output("x_new", x_new),
          to_output("h", h),
          eps};
}

void rms_norm_modulate_cpu(Sizes sizes, int dtype, RowsTuple x, VectorTuple weight,
                           VectorTuple scale, VectorTuple shift, Address y, float eps, int isa,
                           int threads) {
  if (is_empty(sizes)) return;
  const auto args = rms_norm_modulate_args(sizes, dtype, x, weight, scale, shift, y, eps);
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::rms_norm_modulate(args, chosen, threads);
}

void gated_residual_norm_cpu(Sizes sizes, int dtype, RowsTuple x, RowsTuple y, VectorTuple gate,
                             VectorTuple weight, VectorTuple scale, VectorTuple shift,
                             Address x_new, Address h, float eps, int isa, int threads) {
  if (is_empty(sizes)) return;
  const auto args =
      gated_residual_norm_args(sizes, dtype, x, y, gate, weight, scale, shift, x_new, h, eps);
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::gated_residual_norm(args, chosen, threads);
}

#ifdef PIXELDIFF_CUDA
void rms_norm_modulate_cuda(Sizes sizes, int dtype, RowsTuple x, VectorTuple weight,
                            VectorTuple scale, VectorTuple shift, Address y, float eps, int device,
                            Address stream) {
  if (is_empty(sizes)) return;
  const auto args = rms_norm_modulate_args(sizes, dtype, x, weight, scale, shift, y, eps);
  py::gil_scoped_release unlocked;
  cuda::rms_norm_modulate(args, device, reinterpret_cast<void*>(stream));
}

void gated_residual_norm_cuda(Sizes sizes, int dtype, RowsTuple x, RowsTuple y, VectorTuple gate,
                              VectorTuple weight, VectorTuple scale, VectorTuple shift,
                              Address x_new, Address h, float eps, int device, Address stream) {
  if (is_empty(sizes)) return;
  const auto args =
      gated_residual_norm_args(sizes, dtype, x, y, gate, weight, scale, shift, x_new, h, eps);
  py::gil_scoped_release unlocked;
  cuda::gated_residual_norm(args, device, reinterpret_cast<void*>(stream));
}
#endif

py::dict build_info() {
  py::list compiled, usable;
  for (const cpu::Isa isa : cpu::kIsas) {
    if (cpu::isa_compiled(isa)) compiled.append(cpu::isa_name(isa));
    if (cpu::isa_usable(isa)) usable.append(cpu::isa_name(isa));
  }
  py::dict info;
  info["version"] = PIXELDIFF_VERSION;
  info["compiler"] = PIXELDIFF_COMPILER;
  info["build_type"] = PIXELDIFF_BUILD_TYPE;
  info["threads"] = PIXELDIFF_THREADS;
  info["sanitizer"] = PIXELDIFF_SANITIZER;
  info["cpu_isa"] = compiled;
  info["cpu_isa_usable"] = usable;
#ifdef PIXELDIFF_CUDA
  info["cuda"] = PIXELDIFF_CUDA_VERSION;
  info["cuda_archs"] = PIXELDIFF_CUDA_ARCH_LIST;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
  info["cuda_note"] = PIXELDIFF_CUDA_NOTE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of pixeldiff; see pixeldiff.native for the loader.";
  m.attr("INTERFACE") = kInterface;
  m.def("build_info", &build_info, "What this binary was built with, and what of it runs here.");
  m.def("best_isa", [] { return static_cast<int>(cpu::best_isa()); });
  m.def("isa_usable",
        [](int code) { return is_isa_code(code) && cpu::isa_usable(static_cast<cpu::Isa>(code)); });
  m.def("rms_norm_modulate_cpu", &rms_norm_modulate_cpu);
  m.def("gated_residual_norm_cpu", &gated_residual_norm_cpu);
  bind_gated_norm_residual(m);
  bind_pixel(m);
  bind_joint_attention(m);
  bind_local_decoder(m);
  bind_qk_norm_rope(m);
#ifdef PIXELDIFF_SM90
  bind_qkv_norm_rope(m);
#endif
  bind_sigma_gate(m);
  bind_swiglu(m);
#ifdef PIXELDIFF_CUDA
  m.def("rms_norm_modulate_cuda", &rms_norm_modulate_cuda);
  m.def("gated_residual_norm_cuda", &gated_residual_norm_cuda);
#endif
}

}  // namespace pixeldiff
