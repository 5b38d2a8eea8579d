#include "../cpu/local_decoder_down.h"
#include "../cpu/local_decoder_up.h"

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

}  // namespace

void bind_local_decoder(pybind11::module_& m) {
  m.def("local_decoder_down_cpu", &local_decoder_down_cpu);
  m.def("local_decoder_up_cpu", &local_decoder_up_cpu);
}

}  // namespace pixeldiff
