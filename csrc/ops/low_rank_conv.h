// shrank::low_rank_conv and shrank::low_rank_conv_train (schemas and law: shrank/ops/conv.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "boxed.h"

namespace shrank {

using Sizes = std::vector<int64_t>;

struct LowRankConv {
  const Tensor& x;
  const Tensor& down;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  const Sizes& stride;
  const Sizes& padding;  // of each dimension, or before and after each
  const Sizes& dilation;
  int64_t groups, up_groups;
  std::string_view activation;
  const std::optional<Tensor>& residual;
};

Tensor low_rank_conv(const LowRankConv& args, const Runtime& runtime);
std::tuple<Tensor, Tensor> low_rank_conv_train(const LowRankConv& args, const Runtime& runtime);

// As low_rank_linear_as.
std::tuple<Tensor, Tensor> low_rank_conv_as(const LowRankConv& args, const Named& named, const Runtime& runtime);

// Everything that may compute this, as JSON (select/explain.h).
std::string low_rank_conv_choices(const LowRankConv& args, int64_t most, const Runtime& runtime);

using BoxedLowRankConv = Boxed<LowRankConv, TensorIn, TensorIn, TensorIn, MaybeTensor, const Sizes&, const Sizes&,
                               const Sizes&, int64_t, int64_t, std::string_view, MaybeTensor>;

// Registers all for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_CONV(library, runtime) SHRANK_IMPL(library, low_rank_conv, BoxedLowRankConv, runtime)

}  // namespace shrank
