// The conformance program on the emulator.
#include "conformance.h"

#include <pybind11/stl.h>

#include <map>

#include "../conformance/conformance_emulated.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

struct Words { std::vector<uint32_t> input, output; };

std::map<std::string, Words> run(uint64_t seed, bool copies_early) {
  std::map<std::string, Words> words;
  for (auto& result : conformance::run_emulated({seed, copies_early}))
    words[result.name] = {std::move(result.input), std::move(result.output)};
  return words;
}

}  // namespace

void bind_conformance(py::module_ m) {
  py::class_<Words>(m, "Words").def_readonly("input", &Words::input).def_readonly("output", &Words::output);
  m.def("run", &run, "seed"_a = 0, "copies_early"_a = false,
        "Every instruction on the emulator: its name -> the words it was given and the words it answered");
}

}  // namespace shrank
