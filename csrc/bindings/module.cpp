// shrank_dev: the parts that need no GPU, for tests and developers. Not in any wheel.
#include <pybind11/pybind11.h>

#include "activation.h"
#include "conformance.h"
#include "conv.h"
#include "emulator.h"
#include "linear.h"
#include "select.h"

namespace py = pybind11;

PYBIND11_MODULE(shrank_dev, m) {
  py::module_ select = m.def_submodule("select", "(problem, Device) -> kernel");
  shrank::bind_select_linear(select);
  shrank::bind_select_conv(select);
  shrank::bind_activation(m.def_submodule("activation", "the activations of the kernels"));
  shrank::bind_emulator(m.def_submodule("emulator", "kernels on a CPU, watched"));
  shrank::bind_linear(m.def_submodule("linear", "the matrix kernels in the emulator"));
  shrank::bind_conv(m.def_submodule("conv", "the convolution kernels in the emulator"));
  shrank::bind_conformance(m.def_submodule("conformance", "every instruction of csrc/arch in the emulator"));
}
