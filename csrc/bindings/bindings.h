// One function per file of this folder; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace pixeldiff {

void bind_gated_norm_residual(pybind11::module_& m);
void bind_pixel(pybind11::module_& m);
void bind_joint_attention(pybind11::module_& m);
void bind_local_decoder(pybind11::module_& m);
void bind_qk_norm_rope(pybind11::module_& m);
#ifdef PIXELDIFF_SM90
void bind_qkv_norm_rope(pybind11::module_& m);
#endif
void bind_sigma_gate(pybind11::module_& m);
void bind_swiglu(pybind11::module_& m);

}  // namespace pixeldiff
