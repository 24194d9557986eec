// shrank::low_rank_linear_multi (schema and law: shrank/ops/multi.py).
#pragma once

#include <optional>
#include <vector>

#include "runtime.h"
#include "tensors.h"

namespace shrank {

// Several layers of one x, each pivoted if it has an order.
struct LowRankLinearMulti {
  const Tensor& x;
  const std::vector<Tensor>& down;
  const std::vector<Tensor>& up;
  const std::vector<std::optional<Tensor>>& bias;
  const std::vector<std::optional<Tensor>>& pivot_bias;
  const std::vector<std::optional<Tensor>>& order;
};

// A y of each, with the bits that low_rank_linear or low_rank_pivoted gives it. Neighbours that run by the kernels for a
// few rows share their launches.
std::vector<Tensor> low_rank_linear_multi(const LowRankLinearMulti& args, const Runtime& runtime);

// All together by the kernels for a few rows, `tokens` of them at a time, K in so many splits of each layer; or an error
// that says why not.
std::vector<Tensor> low_rank_linear_multi_as(const LowRankLinearMulti& args, int64_t tokens,
                                             const std::vector<int64_t>& splits, const Runtime& runtime);

// Registers both for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_LINEAR_MULTI(library, runtime)                                                            \
  library.impl("low_rank_linear_multi", TORCH_BOX((&::shrank::boxed::low_rank_linear_multi<&runtime>)));               \
  library.impl("low_rank_linear_multi_as", TORCH_BOX((&::shrank::boxed::low_rank_linear_multi_as<&runtime>)))

namespace boxed {

template <const Runtime* runtime>
std::vector<Tensor> low_rank_linear_multi(const Tensor& x, const std::vector<Tensor>& down,
                                          const std::vector<Tensor>& up, const std::vector<std::optional<Tensor>>& bias,
                                          const std::vector<std::optional<Tensor>>& pivot_bias,
                                          const std::vector<std::optional<Tensor>>& order) {
  return shrank::low_rank_linear_multi({x, down, up, bias, pivot_bias, order}, *runtime);
}

template <const Runtime* runtime>
std::vector<Tensor> low_rank_linear_multi_as(const Tensor& x, const std::vector<Tensor>& down,
                                             const std::vector<Tensor>& up,
                                             const std::vector<std::optional<Tensor>>& bias,
                                             const std::vector<std::optional<Tensor>>& pivot_bias,
                                             const std::vector<std::optional<Tensor>>& order, int64_t tokens,
                                             const std::vector<int64_t>& splits) {
  return shrank::low_rank_linear_multi_as({x, down, up, bias, pivot_bias, order}, tokens, splits, *runtime);
}

}  // namespace boxed
}  // namespace shrank
