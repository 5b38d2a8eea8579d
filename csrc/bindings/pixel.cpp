// Bindings of the pixel stream's kernels. Every tensor not given with strides is contiguous.
#include "arguments.h"
#include "bindings.h"

#include "../cpu/pixel_adaln_compress.h"
#include "../cpu/pixel_adaln_mlp.h"
#include "../cpu/pixel_embed.h"
#include "../cpu/pixel_head.h"
#include "../cpu/pixel_head_step.h"
#ifdef PIXELDIFF_SM90
#include "../cuda/pixel_adaln_compress.h"
#include "../cuda/pixel_adaln_mlp.h"
#endif

namespace py = pybind11;

namespace pixeldiff {
namespace {

using Four = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using Strides = std::tuple<int64_t, int64_t, int64_t>;

constexpr int64_t kMaxChannels = 64;  // of pixel_tile.h

void check_sizes(int64_t p, int64_t patch, int64_t height, int64_t width) {
  if (p < 4 || p > kMaxChannels || p % 4)
    throw std::invalid_argument("p must be a multiple of 4 up to 64, got " + std::to_string(p));
  if (patch < 1 || height < 0 || width < 0 || height % patch || width % patch)
    throw std::invalid_argument("H and W must be multiples of the patch size");
}

// x: address, dtype code, strides over B, C, H
void pixel_embed_cpu(Four sizes, int64_t patch, int64_t p, Address x, int x_dtype, Strides strides,
                     Address weight, Address bias, Address pos_x_planes, Address pos_y, int dtype,
                     Address q, int isa, int threads) {
  const auto [B, C, H, W] = sizes;
  check_sizes(p, patch, H, W);
  const auto [stride_b, stride_c, stride_h] = strides;
  const PixelEmbedArgs args{B,
                            C,
                            H,
                            W,
                            patch,
                            p,
                            to_dtype(x_dtype),
                            to_pointer<const void>("x", x),
                            stride_b,
                            stride_c,
                            stride_h,
                            to_pointer<const float>("weight", weight),
                            to_pointer<const float>("bias", bias),
                            to_pointer<const float>("pos_x", pos_x_planes),
                            to_pointer<const float>("pos_y", pos_y),
                            to_dtype(dtype),
                            to_pointer<void>("q", q)};
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::pixel_embed(args, chosen, threads);
}

// sizes: R, J, p, elements between patches of q
PixelGroup to_group(Four sizes, int dtype, Address q, Address mod, Address norm, float eps) {
  const auto [R, J, p, patch_stride] = sizes;
  check_sizes(p, 1, R, J);
  if (patch_stride < J * p) throw std::invalid_argument("patches of q must not overlap");
  return {R,
          J,
          p,
          to_dtype(dtype),
          patch_stride,
          to_pointer<const void>("q", q),
          to_pointer<const void>("mod", mod),
          to_pointer<const float>("norm", norm),
          eps};
}

void pixel_adaln_compress_cpu(Four sizes, int dtype, Address q, Address mod, Address norm,
                              float eps, Address z, int isa, int threads) {
  const PixelAdalnCompressArgs args{to_group(sizes, dtype, q, mod, norm, eps),
                                    to_pointer<void>("z", z)};
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::pixel_adaln_compress(args, chosen, threads);
}

void pixel_adaln_mlp_cpu(Four sizes, int dtype, Address q, Address mod, Address norm, float eps,
                         Address attn, int64_t hidden, Address fc1_weight, Address fc1_bias,
                         Address fc2_columns, Address fc2_bias, Address out, int isa, int threads) {
  const PixelAdalnMlpArgs args{to_group(sizes, dtype, q, mod, norm, eps),
                               to_pointer<const void>("attn", attn),
                               hidden,
                               to_pointer<const float>("fc1 weight", fc1_weight),
                               to_pointer<const float>("fc1 bias", fc1_bias),
                               to_pointer<const float>("fc2 weight", fc2_columns),
                               to_pointer<const float>("fc2 bias", fc2_bias),
                               to_pointer<void>("out", out)};
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::pixel_adaln_mlp(args, chosen, threads);
}

// sizes: R, H, W, C
PixelHeadArgs to_head(Four sizes, int64_t patch, int64_t p, int dtype, Address q, Address norm,
                      Address weight, Address bias, float eps) {
  const auto [R, H, W, C] = sizes;
  check_sizes(p, patch, H, W);
  const int64_t patches = H / patch * (W / patch);
  if (patches == 0 || R % patches) throw std::invalid_argument("q must hold whole images");
  return {R,
          H,
          W,
          patch,
          p,
          C,
          to_dtype(dtype),
          to_pointer<const void>("q", q),
          to_pointer<const float>("norm", norm),
          to_pointer<const float>("weight", weight),
          to_pointer<const float>("bias", bias),
          nullptr,
          eps};
}

void pixel_head_cpu(Four sizes, int64_t patch, int64_t p, int dtype, Address q, Address norm,
                    Address weight, Address bias, float eps, Address v, int isa, int threads) {
  PixelHeadArgs args = to_head(sizes, patch, p, dtype, q, norm, weight, bias, eps);
  args.v = to_pointer<float>("v", v);
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::pixel_head(args, chosen, threads);
}

// noise is 0 in an ODE and in the last step, x0 where it is not wanted.
void pixel_head_step_cpu(Four sizes, int64_t patch, int64_t p, int dtype, Address q, Address norm,
                         Address weight, Address bias, float eps, Address x, Address noise,
                         Address x_next, Address x0, double t, double t_next, bool ode,
                         bool predicts_x0, bool fp64_state, int isa, int threads) {
  if (!ode && t_next != 0) to_pointer<const float>("noise", noise);
  const PixelHeadStepArgs args{to_head(sizes, patch, p, dtype, q, norm, weight, bias, eps),
                               to_pointer<const float>("x", x),
                               reinterpret_cast<const float*>(noise),
                               to_pointer<float>("x_next", x_next),
                               reinterpret_cast<float*>(x0),
                               t,
                               t_next,
                               ode,
                               predicts_x0,
                               fp64_state};
  const cpu::Isa chosen = to_isa(isa);
  py::gil_scoped_release unlocked;
  cpu::pixel_head_step(args, chosen, threads);
}

#ifdef PIXELDIFF_SM90
using MatrixTuple = std::tuple<Address, int64_t>;  // data, elements between rows
using Two = std::tuple<Address, Address>;

// What both kernels are given. sizes: patches, pixels, channels of u. q: address, elements between
// patches and between pixels. vectors: ada bias, norm weight.
cuda::PixelAdalnArgs to_pixel_adaln(Sizes sizes, int dtype, RowsTuple q, MatrixTuple u,
                                    MatrixTuple ada, Two vectors, Address out, float eps) {
  const auto [rows, pixels, D] = sizes;
  const auto [q_data, q_stride_row, q_stride_pixel] = q;
  const auto [u_data, u_stride] = u;
  const auto [ada_data, ada_stride] = ada;
  const auto [ada_bias, norm] = vectors;
  return {rows,
          pixels,
          D,
          to_dtype(dtype),
          to_pointer<const void>("q", q_data),
          q_stride_row,
          q_stride_pixel,
          to_pointer<const void>("u", u_data),
          u_stride,
          to_pointer<const void>("ada_weight", ada_data),
          ada_stride,
          to_pointer<const void>("ada_bias", ada_bias),
          to_pointer<const void>("norm_weight", norm),
          to_pointer<void>("out", out),
          eps};
}

// z: what the attention tokens are a product of.
void pixel_adaln_compress_cuda(Sizes sizes, int dtype, RowsTuple q, MatrixTuple u, MatrixTuple ada,
                               Two vectors, Address z, float eps, int device, Address stream) {
  if (is_empty(sizes)) return;
  const cuda::PixelAdalnCompressArgs args{to_pixel_adaln(sizes, dtype, q, u, ada, vectors, z, eps)};
  py::gil_scoped_release unlocked;
  cuda::pixel_adaln_compress(args, device, reinterpret_cast<void*>(stream));
}

// mlp: its width, weight and bias of fc1 and of fc2.
void pixel_adaln_mlp_cuda(Sizes sizes, int dtype, RowsTuple q, MatrixTuple u, Address a,
                          MatrixTuple ada, Two vectors,
                          std::tuple<int64_t, Address, Address, Address, Address> mlp, Address out,
                          float eps, int device, Address stream) {
  if (is_empty(sizes)) return;
  const auto [hidden, fc1_weight, fc1_bias, fc2_weight, fc2_bias] = mlp;
  const cuda::PixelAdalnMlpArgs args{to_pixel_adaln(sizes, dtype, q, u, ada, vectors, out, eps),
                                     hidden,
                                     to_pointer<const void>("a", a),
                                     to_pointer<const void>("fc1 weight", fc1_weight),
                                     to_pointer<const void>("fc1 bias", fc1_bias),
                                     to_pointer<const void>("fc2 weight", fc2_weight),
                                     to_pointer<const void>("fc2 bias", fc2_bias)};
  py::gil_scoped_release unlocked;
  cuda::pixel_adaln_mlp(args, device, reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void bind_pixel(py::module_& m) {
  m.def("pixel_embed_cpu", &pixel_embed_cpu);
  m.def("pixel_adaln_compress_cpu", &pixel_adaln_compress_cpu);
  m.def("pixel_adaln_mlp_cpu", &pixel_adaln_mlp_cpu);
#ifdef PIXELDIFF_SM90
  m.def("pixel_adaln_compress_cuda", &pixel_adaln_compress_cuda);
  m.def("pixel_adaln_mlp_cuda", &pixel_adaln_mlp_cuda);
#endif
  m.def("pixel_head_cpu", &pixel_head_cpu);
  m.def("pixel_head_step_cpu", &pixel_head_step_cpu);
}

}  // namespace pixeldiff
