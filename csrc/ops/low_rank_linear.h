// shrank::low_rank_linear and shrank::low_rank_linear_train (schemas and law: shrank/ops/linear.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "boxed.h"

namespace shrank {

struct LowRankLinear {
  const Tensor& x;
  const Tensor& down;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  std::string_view activation;
  const std::optional<Tensor>& residual;
};

// activation(z) + residual, in one pass, in place of z, which is contiguous.
Tensor finished(const Tensor& z, const std::optional<Tensor>& residual, LinearProblem problem, const Runtime& runtime);

// After a look at the law.
LinearProblem problem_of(const LowRankLinear& args, bool training, const Runtime& runtime);

Tensor low_rank_linear(const LowRankLinear& args, const Runtime& runtime);
std::tuple<Tensor, Tensor> low_rank_linear_train(const LowRankLinear& args, const Runtime& runtime);

// By the kernel that is named, on the tile that is named, or an error that says why not. Without training, h says
// nothing.
std::tuple<Tensor, Tensor> low_rank_linear_as(const LowRankLinear& args, const Named& named, const Runtime& runtime);

// Everything that may compute this, as JSON (select/explain.h).
std::string low_rank_linear_choices(const LowRankLinear& args, int64_t most, const Runtime& runtime);

using BoxedLowRankLinear =
    Boxed<LowRankLinear, TensorIn, TensorIn, TensorIn, MaybeTensor, std::string_view, MaybeTensor>;

// Registers all for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_LINEAR(library, runtime) SHRANK_IMPL(library, low_rank_linear, BoxedLowRankLinear, runtime)

}  // namespace shrank
