// shrank::pivoted_backward (schema and law: shrank/ops/pivoted_backward.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "runtime.h"
#include "tensors.h"

namespace shrank {

struct PivotedBackward {
  const Tensor& grad;
  const Tensor& h;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& pivot_bias;
  const Tensor& order;
  std::string_view activation;
  bool needs_bias;
};

// The gradient of the pre-activation, and its sums over rows, which are empty unless they are needed.
std::tuple<Tensor, Tensor> pivoted_backward(const PivotedBackward& args, const Runtime& runtime);

// By the kernel that is named, on the tile that is named, or an error that says why not.
std::tuple<Tensor, Tensor> pivoted_backward_as(const PivotedBackward& args, std::string_view kernel,
                                               const std::vector<int64_t>& grid, const Runtime& runtime);

// Registers both for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_PIVOTED_BACKWARD(library, runtime)                                                                 \
  library.impl("pivoted_backward", TORCH_BOX((&::shrank::boxed::pivoted_backward<&runtime>)));                         \
  library.impl("pivoted_backward_as", TORCH_BOX((&::shrank::boxed::pivoted_backward_as<&runtime>)))

namespace boxed {

template <const Runtime* runtime>
std::tuple<Tensor, Tensor> pivoted_backward(const Tensor& grad, const Tensor& h, const Tensor& up,
                                            const std::optional<Tensor>& bias, const std::optional<Tensor>& pivot_bias,
                                            const Tensor& order, std::string_view activation, bool needs_bias) {
  return shrank::pivoted_backward({grad, h, up, bias, pivot_bias, order, activation, needs_bias}, *runtime);
}

template <const Runtime* runtime>
std::tuple<Tensor, Tensor> pivoted_backward_as(const Tensor& grad, const Tensor& h, const Tensor& up,
                                               const std::optional<Tensor>& bias,
                                               const std::optional<Tensor>& pivot_bias, const Tensor& order,
                                               std::string_view activation, bool needs_bias, std::string_view kernel,
                                               const std::vector<int64_t>& grid) {
  return shrank::pivoted_backward_as({grad, h, up, bias, pivot_bias, order, activation, needs_bias}, kernel, grid,
                                     *runtime);
}

}  // namespace boxed
}  // namespace shrank
