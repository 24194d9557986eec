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

// What the backward passes share. Sums over rows, which threads leave in fp32, or fp64 of fp64, in (rows, N), are added up
// in the order of the rows, so that the same bits come out each time; where none are wanted, the result is empty.
std::optional<Tensor> sums_for(bool wanted, const Tensor& like, int64_t rows, int64_t N);
Tensor added_up(const std::optional<Tensor>& sums, const Tensor& like);

// The gradients of z and of the bias from that of activation(z), in one pass, which overwrites z.
std::tuple<Tensor, Tensor> through_activation(const Tensor& z, const Tensor& grad, bool needs_bias,
                                              LinearProblem problem, const Runtime& runtime);

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
