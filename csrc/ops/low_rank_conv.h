// shrank::low_rank_conv and shrank::low_rank_conv_train (schemas and law: shrank/ops/conv.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "runtime.h"
#include "tensors.h"

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

// Registers all for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_CONV(library, runtime)                                                                    \
  library.impl("low_rank_conv", TORCH_BOX((&::shrank::boxed::low_rank_conv<&runtime>)));                               \
  library.impl("low_rank_conv_train", TORCH_BOX((&::shrank::boxed::low_rank_conv_train<&runtime>)));                   \
  library.impl("low_rank_conv_as", TORCH_BOX((&::shrank::boxed::low_rank_conv_as<&runtime>)));                         \
  library.impl("low_rank_conv_choices", TORCH_BOX((&::shrank::boxed::low_rank_conv_choices<&runtime>)))

namespace boxed {

template <const Runtime* runtime>
Tensor low_rank_conv(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias,
                     const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                     int64_t up_groups, std::string_view activation, const std::optional<Tensor>& residual) {
  return shrank::low_rank_conv({x, down, up, bias, stride, padding, dilation, groups, up_groups, activation, residual},
                               *runtime);
}

template <const Runtime* runtime>
std::tuple<Tensor, Tensor> low_rank_conv_train(const Tensor& x, const Tensor& down, const Tensor& up,
                                               const std::optional<Tensor>& bias, const Sizes& stride,
                                               const Sizes& padding, const Sizes& dilation, int64_t groups,
                                               int64_t up_groups, std::string_view activation,
                                               const std::optional<Tensor>& residual) {
  return shrank::low_rank_conv_train(
      {x, down, up, bias, stride, padding, dilation, groups, up_groups, activation, residual}, *runtime);
}

template <const Runtime* runtime>
std::tuple<Tensor, Tensor> low_rank_conv_as(const Tensor& x, const Tensor& down, const Tensor& up,
                                            const std::optional<Tensor>& bias, const Sizes& stride,
                                            const Sizes& padding, const Sizes& dilation, int64_t groups,
                                            int64_t up_groups, std::string_view activation,
                                            const std::optional<Tensor>& residual, bool training,
                                            std::string_view kernel, const Sizes& grid) {
  return shrank::low_rank_conv_as(
      {x, down, up, bias, stride, padding, dilation, groups, up_groups, activation, residual}, {training, kernel, grid},
      *runtime);
}

template <const Runtime* runtime>
std::string low_rank_conv_choices(const Tensor& x, const Tensor& down, const Tensor& up,
                                  const std::optional<Tensor>& bias, const Sizes& stride, const Sizes& padding,
                                  const Sizes& dilation, int64_t groups, int64_t up_groups, std::string_view activation,
                                  const std::optional<Tensor>& residual, int64_t most) {
  return shrank::low_rank_conv_choices(
      {x, down, up, bias, stride, padding, dilation, groups, up_groups, activation, residual}, most, *runtime);
}

}  // namespace boxed
}  // namespace shrank
