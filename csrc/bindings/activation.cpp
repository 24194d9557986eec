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

template <typename T> std::vector<float> activated(Activation kind, std::vector<float> numbers) {
  with_activation(kind, [&](auto known) {
    for (float& z : numbers) z = activate<T, decltype(known)::value>(z);
  });
  return numbers;
}

std::vector<float> activate_all(const std::string& dtype, const std::string& activation, std::vector<float> numbers) {
  const Activation kind = parse_activation(activation);
  switch (parse_dtype(dtype)) {
    case Dtype::float16: return activated<arch::float16>(kind, std::move(numbers));
    case Dtype::bfloat16: return activated<arch::bfloat16>(kind, std::move(numbers));
    default: throw std::invalid_argument("wanted a dtype of 16 bits");
  }
}

}  // namespace

void bind_activation(py::module_ m) {
  m.def("activate", &activate_all, "dtype"_a, "activation"_a, "numbers"_a,
        "As a kernel computes the activation for that dtype, before it rounds");
}

}  // namespace shrank
