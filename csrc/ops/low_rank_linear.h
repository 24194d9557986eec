// shrank::low_rank_linear and shrank::low_rank_linear_train (schemas and law: shrank/ops/linear.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "backend.h"
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

Tensor low_rank_linear(const LowRankLinear& args, const Backend& backend);
std::tuple<Tensor, Tensor, Tensor> low_rank_linear_train(const LowRankLinear& args, const Backend& backend);

// Registers both for one dispatch key: `backend` is a constexpr Backend.
#define SHRANK_IMPL_LOW_RANK_LINEAR(library, backend)                                                                  \
  library.impl("low_rank_linear", TORCH_BOX((&::shrank::boxed::low_rank_linear<&backend>)));                           \
  library.impl("low_rank_linear_train", TORCH_BOX((&::shrank::boxed::low_rank_linear_train<&backend>)))

namespace boxed {

template <const Backend* backend>
Tensor low_rank_linear(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias,
                       std::string_view activation, const std::optional<Tensor>& residual) {
  return shrank::low_rank_linear({x, down, up, bias, activation, residual}, *backend);
}

template <const Backend* backend>
std::tuple<Tensor, Tensor, Tensor> low_rank_linear_train(const Tensor& x, const Tensor& down, const Tensor& up,
                                                         const std::optional<Tensor>& bias, std::string_view activation,
                                                         const std::optional<Tensor>& residual) {
  return shrank::low_rank_linear_train({x, down, up, bias, activation, residual}, *backend);
}

}  // namespace boxed
}  // namespace shrank
