// The matrix kernels for tests: tensors by their addresses.
#include "linear.h"

#include <pybind11/stl.h>

#include "../kernels/expand_backward_emulated.h"
#include "../kernels/low_rank_linear_emulated.h"
#include "../kernels/shrink_expand_emulated.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

using Address = std::uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

emulator::Result emulate(const LinearGrid& grid, int64_t M, int K, int N, int R, const std::string& dtype,
                         const std::string& activation, Address x, Address down, Address up, Address bias,
                         Address residual, Address h, Address y, uint64_t seed, bool copies_early) {
  const LowRankLinearParams params{pointer(x),
                                   pointer(down),
                                   pointer(up),
                                   pointer(bias),
                                   pointer(residual),
                                   pointer(h),
                                   pointer(y),
                                   M,
                                   K,
                                   N,
                                   R,
                                   parse_dtype(dtype),
                                   parse_activation(activation)};
  return emulate_low_rank_linear(params, grid, {seed, copies_early});
}

emulator::Result emulate_backward(const LinearGrid& grid, int64_t M, int N, int R, const std::string& dtype,
                                  const std::string& activation, Address h, Address up, Address bias, Address grad,
                                  Address dz, Address sums, uint64_t seed, bool copies_early) {
  const ExpandBackwardParams params{pointer(h),
                                    pointer(up),
                                    pointer(bias),
                                    pointer(grad),
                                    pointer(dz),
                                    static_cast<float*>(pointer(sums)),
                                    M,
                                    N,
                                    R,
                                    parse_dtype(dtype),
                                    parse_activation(activation)};
  return emulate_expand_backward(params, grid, {seed, copies_early});
}

emulator::Result emulate_few_rows(int tokens, int splits, int M, int K, int N, int R, const std::string& dtype,
                                  const std::string& activation, Address x, Address down, Address up, Address bias,
                                  Address residual, Address sums, Address h, Address y, uint64_t seed) {
  const ShrinkExpandParams params{pointer(x),
                                  pointer(down),
                                  pointer(up),
                                  pointer(bias),
                                  pointer(residual),
                                  static_cast<float*>(pointer(sums)),
                                  pointer(h),
                                  pointer(y),
                                  M,
                                  K,
                                  N,
                                  R,
                                  splits,
                                  parse_dtype(dtype),
                                  parse_activation(activation)};
  return emulate_shrink_expand(params, {tokens}, {seed, false});
}

}  // namespace

void bind_linear(py::module_ m) {
  m.def("emulate", &emulate, "grid"_a, "M"_a, "K"_a, "N"_a, "R"_a, "dtype"_a, "activation"_a, "x"_a = 0, "down"_a = 0,
        "up"_a, "bias"_a = 0, "residual"_a = 0, "h"_a = 0, "y"_a, "seed"_a = 0, "copies_early"_a = false);
  m.def("emulate_few_rows", &emulate_few_rows, "tokens"_a, "splits"_a, "M"_a, "K"_a, "N"_a, "R"_a, "dtype"_a,
        "activation"_a, "x"_a, "down"_a, "up"_a, "bias"_a = 0, "residual"_a = 0, "sums"_a = 0, "h"_a = 0, "y"_a,
        "seed"_a = 0);
  m.def("emulate_backward", &emulate_backward, "grid"_a, "M"_a, "N"_a, "R"_a, "dtype"_a, "activation"_a, "h"_a, "up"_a,
        "bias"_a = 0, "grad"_a, "dz"_a, "sums"_a = 0, "seed"_a = 0, "copies_early"_a = false);
}

}  // namespace shrank
