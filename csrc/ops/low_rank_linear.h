// shrank::low_rank_linear and shrank::low_rank_linear_train (schemas and law: shrank/ops/linear.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "runtime.h"
#include "tensors.h"

namespace shrank {

struct LowRankLinear {
  const Tensor& x;
  const Tensor& down;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  std::string_view activation;
  const std::optional<Tensor>& residual;
};

Tensor low_rank_linear(const LowRankLinear& args, const Runtime& runtime);
std::tuple<Tensor, Tensor, Tensor> low_rank_linear_train(const LowRankLinear& args, const Runtime& runtime);

// Registers both for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_LINEAR(library, runtime)                                                                  \
  library.impl("low_rank_linear", TORCH_BOX((&::shrank::boxed::low_rank_linear<&runtime>)));                           \
  library.impl("low_rank_linear_train", TORCH_BOX((&::shrank::boxed::low_rank_linear_train<&runtime>)))

namespace boxed {

template <const Runtime* runtime>
Tensor low_rank_linear(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias,
                       std::string_view activation, const std::optional<Tensor>& residual) {
  return shrank::low_rank_linear({x, down, up, bias, activation, residual}, *runtime);
}

template <const Runtime* runtime>
std::tuple<Tensor, Tensor, Tensor> low_rank_linear_train(const Tensor& x, const Tensor& down, const Tensor& up,
                                                         const std::optional<Tensor>& bias, std::string_view activation,
                                                         const std::optional<Tensor>& residual) {
  return shrank::low_rank_linear_train({x, down, up, bias, activation, residual}, *runtime);
}

}  // namespace boxed
}  // namespace shrank
