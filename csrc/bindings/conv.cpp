// The convolution kernels for tests: tensors by their addresses.
#include "conv.h"

#include <pybind11/stl.h>

#include "../kernels/low_rank_conv_emulated.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

using Address = std::uintptr_t;

emulator::Result emulate(const ConvProblem& problem, const ConvGrid& grid, Address x, Address down, Address up,
                         Address bias, Address residual, Address h, Address y, uint64_t seed, bool copies_early) {
  const auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
  LowRankConvParams params = params_of(problem, grid);
  params.x = pointer(x), params.down = pointer(down), params.up = pointer(up), params.bias = pointer(bias);
  params.residual = pointer(residual), params.h = pointer(h), params.y = pointer(y);
  return emulate_low_rank_conv(params, grid, {seed, copies_early});
}

}  // namespace

void bind_conv(py::module_ m) {
  m.def("emulate", &emulate, "problem"_a, "grid"_a, "x"_a, "down"_a, "up"_a, "bias"_a = 0, "residual"_a = 0, "h"_a = 0,
        "y"_a, "seed"_a = 0, "copies_early"_a = false);
}

}  // namespace shrank
