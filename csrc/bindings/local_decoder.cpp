#include "../cpu/local_decoder_down.h"
#include "../cpu/local_decoder_up.h"
#ifdef PIXELDIFF_CUDA
#include "../cuda/local_decoder_down.h"
#include "../cuda/local_decoder_up.h"
#endif

#include "arguments.h"
#include "bindings.h"

namespace pixeldiff {
namespace {

using Image = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;  // data, strides b, h, w, c

Pixels to_pixels(const char* name, Image image) {
  const auto [address, b, h, w, c] = image;
  return {to_pointer<const void>(name, address), b, h, w, c};
}

void check_sizes(std::initializer_list<int64_t> sizes, int64_t height, int64_t width) {
  for (const int64_t size : sizes)
    if (size < 1) throw std::invalid_argument("sizes must be positive");
  if (height < 2 || width < 2 || height % 2 || width % 2)
    throw std::invalid_argument("H and W must be positive and even");
}

// sizes: B, H, W, Ci, Co
void local_decoder_down_cpu(std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> sizes,
                            int x_dtype, Image x, int dtype, Address weight, Address bias,
                            Address skip, Address pooled, int isa, int threads) {
  const auto [B, H, W, Ci, Co] = sizes;
  check_sizes({B, Ci, Co}, H, W);
  const LocalDecoderDownArgs args{B,
                                  H,
                                  W,
                                  Ci,
                                  Co,
                                  to_dtype(x_dtype),
                                  to_pixels("x", x),
                                  to_dtype(dtype),
                                  to_pointer<const float>("weight", weight),
                                  to_pointer<const float>("bias", bias),
                                  to_pointer<void>("skip", skip),
                                  to_pointer<void>("pooled", pooled)};
  const cpu::Isa chosen = to_isa(isa);
  pybind11::gil_scoped_release unlocked;
  cpu::local_decoder_down(args, chosen, threads);
}

// sizes: B, S, H, W of the result; channels: Ci, Cu, Cs, Co
void local_decoder_up_cpu(std::tuple<int64_t, int64_t, int64_t, int64_t> sizes,
                          std::tuple<int64_t, int64_t, int64_t, int64_t> channels, int dtype,
                          Image x, Image skip, Address up_weight, Address up_bias, Address weight,
                          Address bias, Address y, int isa, int threads) {
  const auto [B, S, H, W] = sizes;
  const auto [Ci, Cu, Cs, Co] = channels;
  check_sizes({B, S, Ci, Cu, Cs, Co}, H, W);
  if (B % S) throw std::invalid_argument("S must divide B");
  const LocalDecoderUpArgs args{B,
                                S,
                                H,
                                W,
                                Ci,
                                Cu,
                                Cs,
                                Co,
                                to_dtype(dtype),
                                to_pixels("x", x),
                                to_pixels("skip", skip),
                                to_pointer<const float>("up_weight", up_weight),
                                to_pointer<const float>("up_bias", up_bias),
                                to_pointer<const float>("weight", weight),
                                to_pointer<const float>("bias", bias),
                                to_pointer<void>("y", y)};
  const cpu::Isa chosen = to_isa(isa);
  pybind11::gil_scoped_release unlocked;
  cpu::local_decoder_up(args, chosen, threads);
}

#ifdef PIXELDIFF_CUDA
using Four = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using Five = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;  // data, strides n, c, r, s

cuda::Taps to_taps(const char* name, Five taps) {
  const auto [address, n, c, r, s] = taps;
  return {to_pointer<const void>(name, address), n, c, r, s};
}

// sizes: B, rows and columns of squares, Ci, Co; x: address, elements between images, rows, columns
// and channels
void local_decoder_down_cuda(std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> sizes,
                             int x_dtype, Image x, Five weight, Address bias, Address skip,
                             Address pooled, int device, Address stream) {
  const auto [B, rows, columns, Ci, Co] = sizes;
  const auto [address, b, h, w, c] = x;
  const cuda::LocalDecoderDownArgs args{B,
                                        rows,
                                        columns,
                                        Ci,
                                        Co,
                                        to_dtype(x_dtype),
                                        {to_pointer<const void>("x", address), b, h, w},
                                        c,
                                        to_taps("weight", weight),
                                        to_pointer<const void>("bias", bias),
                                        to_pointer<void>("skip", skip),
                                        to_pointer<void>("pooled", pooled)};
  pybind11::gil_scoped_release unlocked;
  cuda::local_decoder_down(args, device, reinterpret_cast<void*>(stream));
}

// sizes: B, S, rows and columns of x; channels: Ci, Cu, Cs, Co; x, skip: address, elements between
// images, rows and columns; biases: of u and of the result.
void local_decoder_up_cuda(Four sizes, Four channels,
                           std::tuple<Address, int64_t, int64_t, int64_t> x,
                           std::tuple<Address, int64_t, int64_t, int64_t> skip, Five up_weight,
                           Five weight, std::tuple<Address, Address> biases, Address workspace,
                           Address out, int device, Address stream) {
  const auto [B, S, rows, columns] = sizes;
  const auto [Ci, Cu, Cs, Co] = channels;
  const auto picture = [](const char* name, auto image) {
    const auto [address, b, h, w] = image;
    return cuda::Picture{to_pointer<const void>(name, address), b, h, w};
  };
  const auto [up_bias, bias] = biases;
  const cuda::LocalDecoderUpArgs args{B,
                                      S,
                                      rows,
                                      columns,
                                      Ci,
                                      Cu,
                                      Cs,
                                      Co,
                                      picture("x", x),
                                      picture("skip", skip),
                                      to_taps("up_weight", up_weight),
                                      to_pointer<const void>("up_bias", up_bias),
                                      to_taps("weight", weight),
                                      to_pointer<const void>("bias", bias),
                                      to_pointer<void>("workspace", workspace),
                                      to_pointer<void>("out", out)};
  pybind11::gil_scoped_release unlocked;
  cuda::local_decoder_up(args, device, reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void bind_local_decoder(pybind11::module_& m) {
  m.def("local_decoder_down_cpu", &local_decoder_down_cpu);
  m.def("local_decoder_up_cpu", &local_decoder_up_cpu);
#ifdef PIXELDIFF_CUDA
  m.def("local_decoder_down_cuda", &local_decoder_down_cuda);
  m.def("local_decoder_up_cuda", &local_decoder_up_cuda);
  m.def("local_decoder_up_workspace", &cuda::local_decoder_up_workspace);
#endif
}

}  // namespace pixeldiff
