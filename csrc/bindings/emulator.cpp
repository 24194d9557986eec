// What a run in the emulator found, and its own small kernels.
#include "emulator.h"

#include <pybind11/stl.h>

#include "../../tests/csrc/emulated/micro_kernels.h"
#include "../emulator/launch.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {

void bind_emulator(py::module_ m) {
  using emulator::Counts, emulator::Result;
  py::class_<Counts>(m, "Counts")
      .def_readonly("multiply_adds", &Counts::multiply_adds)
      .def_readonly("load_matrices", &Counts::load_matrices)
      .def_readonly("bank_conflicts", &Counts::bank_conflicts)
      .def_readonly("barriers", &Counts::barriers);
  py::class_<Result>(m, "Result").def_readonly("problems", &Result::problems).def_readonly("counts", &Result::counts);
  m.attr("MICRO") = micro::names();
  using Address = std::uintptr_t;
  m.def("micro", [](const std::string& name, Address input, Address output, uint64_t seed, bool copies_early) {
    return micro::run(name, reinterpret_cast<const uint32_t*>(input), reinterpret_cast<uint32_t*>(output),
                      {seed, copies_early});
  }, "name"_a, "input"_a, "output"_a, "seed"_a = 0, "copies_early"_a = false);
}

}  // namespace shrank
