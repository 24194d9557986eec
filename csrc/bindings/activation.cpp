// The activations of the kernels, number by number, for tests.
#include "activation.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/activation.cuh"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

// change(element, kind, number) for every number, as the kernels for that dtype and activation do.
template <typename Change>
std::vector<float> changed(const std::string& dtype, const std::string& activation, std::vector<float> numbers,
                           const Change& change) {
  with_activation(parse_activation(activation), [&](auto kind) {
    const auto all = [&](auto element) {
      for (float& z : numbers) z = change(element, kind, z);
    };
    switch (parse_dtype(dtype)) {
      case Dtype::float16: return all(arch::float16{});
      case Dtype::bfloat16: return all(arch::bfloat16{});
      default: throw std::invalid_argument("wanted a dtype of 16 bits");
    }
  });
  return numbers;
}

std::vector<float> activate_all(const std::string& dtype, const std::string& activation, std::vector<float> numbers) {
  return changed(dtype, activation, std::move(numbers), [](auto element, auto kind, float z) {
    return activate<decltype(element), decltype(kind)::value>(z);
  });
}

std::vector<float> derive_all(const std::string& dtype, const std::string& activation, std::vector<float> numbers) {
  return changed(dtype, activation, std::move(numbers), [](auto element, auto kind, float z) {
    return activate_backward<decltype(element), decltype(kind)::value>(1, z);
  });
}

}  // namespace

void bind_activation(py::module_ m) {
  m.def("activate", &activate_all, "dtype"_a, "activation"_a, "numbers"_a,
        "As a kernel computes the activation for that dtype, before it rounds");
  m.def("derive", &derive_all, "dtype"_a, "activation"_a, "numbers"_a, "Its derivative");
}

}  // namespace shrank
