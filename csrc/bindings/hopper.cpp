// Kernels for sm_90a on the emulator, for the emulator's own tests: matrices by their addresses.
#include "hopper.h"

#include <pybind11/stl.h>

#include "../../tests/csrc/emulated/hopper_kernels.h"
#include "../../tests/csrc/emulated/hopper_micro.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

emulator::Result run(const std::string& mistake, const std::string& dtype, int M, int N, int K, std::uintptr_t a,
                     std::uintptr_t b, std::uintptr_t c, uint64_t seed, bool copies_early) {
  return tests::tiled_product(mistake, dtype, M, N, K, reinterpret_cast<const void*>(a),
                              reinterpret_cast<const void*>(b), reinterpret_cast<void*>(c), {seed, copies_early});
}

emulator::Result run_micro(const std::string& name, std::uintptr_t input, std::uintptr_t output, uint64_t seed,
                           bool copies_early) {
  return tests::run_hopper_micro(name, reinterpret_cast<const uint32_t*>(input), reinterpret_cast<float*>(output),
                                 {seed, copies_early});
}

}  // namespace

void bind_hopper(py::module_ m) {
  m.attr("MISTAKES") = tests::mistakes();
  m.def("tiled_product", &run, "mistake"_a, "dtype"_a, "M"_a, "N"_a, "K"_a, "a"_a, "b"_a, "c"_a, "seed"_a = 0,
        "copies_early"_a = false);
  m.attr("MICRO") = tests::hopper_micro_names();
  m.def("micro", &run_micro, "name"_a, "input"_a, "output"_a, "seed"_a = 0, "copies_early"_a = false);
}

}  // namespace shrank
