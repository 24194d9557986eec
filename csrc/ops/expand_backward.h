// shrank::expand_backward (schema and law: shrank/ops/expand_backward.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "runtime.h"
#include "tensors.h"

namespace shrank {

struct ExpandBackward {
  const Tensor& grad;
  const Tensor& h;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  std::string_view activation;
  bool needs_bias;
};

// The gradients of the pre-activation and of the bias, which is empty unless it is needed.
std::tuple<Tensor, Tensor> expand_backward(const ExpandBackward& args, const Runtime& runtime);

// By the kernel that is named, on the tile that is named, or an error that says why not.
std::tuple<Tensor, Tensor> expand_backward_as(const ExpandBackward& args, std::string_view kernel,
                                              const std::vector<int64_t>& grid, const Runtime& runtime);

// Registers both for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_EXPAND_BACKWARD(library, runtime)                                                                  \
  library.impl("expand_backward", TORCH_BOX((&::shrank::boxed::expand_backward<&runtime>)));                           \
  library.impl("expand_backward_as", TORCH_BOX((&::shrank::boxed::expand_backward_as<&runtime>)))

namespace boxed {

template <const Runtime* runtime>
std::tuple<Tensor, Tensor> expand_backward(const Tensor& grad, const Tensor& h, const Tensor& up,
                                           const std::optional<Tensor>& bias, std::string_view activation,
                                           bool needs_bias) {
  return shrank::expand_backward({grad, h, up, bias, activation, needs_bias}, *runtime);
}

template <const Runtime* runtime>
std::tuple<Tensor, Tensor> expand_backward_as(const Tensor& grad, const Tensor& h, const Tensor& up,
                                              const std::optional<Tensor>& bias, std::string_view activation,
                                              bool needs_bias, std::string_view kernel,
                                              const std::vector<int64_t>& grid) {
  return shrank::expand_backward_as({grad, h, up, bias, activation, needs_bias}, kernel, grid, *runtime);
}

}  // namespace boxed
}  // namespace shrank
