// What a run in the emulator found.
#include "emulator.h"

#include <pybind11/stl.h>

#include "../emulator/launch.h"

namespace py = pybind11;

namespace shrank {

void bind_emulator(py::module_ m) {
  using emulator::Counts, emulator::Result;
  py::class_<Counts>(m, "Counts")
      .def_readonly("multiply_adds", &Counts::multiply_adds)
      .def_readonly("load_matrices", &Counts::load_matrices)
      .def_readonly("bank_conflicts", &Counts::bank_conflicts)
      .def_readonly("barriers", &Counts::barriers);
  py::class_<Result>(m, "Result")
      .def_readonly("problems", &Result::problems)
      .def_readonly("counts", &Result::counts);
}

}  // namespace shrank
