// shrank::low_rank_pivoted and shrank::low_rank_pivoted_train (schemas and law: shrank/ops/pivoted.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "runtime.h"
#include "tensors.h"

namespace shrank {

struct LowRankPivoted {
  const Tensor& x;
  const Tensor& down;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& pivot_bias;
  const Tensor& order;
  std::string_view activation;
  const std::optional<Tensor>& residual;
};

Tensor low_rank_pivoted(const LowRankPivoted& args, const Runtime& runtime);
std::tuple<Tensor, Tensor> low_rank_pivoted_train(const LowRankPivoted& args, const Runtime& runtime);

// By the kernel that is named, on the tile that is named, or an error that says why not. Without training, h says
// nothing.
std::tuple<Tensor, Tensor> low_rank_pivoted_as(const LowRankPivoted& args, const Named& named, const Runtime& runtime);

// Everything that may compute this, as JSON (select/explain.h).
std::string low_rank_pivoted_choices(const LowRankPivoted& args, int64_t most, const Runtime& runtime);

// The factors of the second stage, and where its columns go.
struct PivotedUp {
  const Tensor& up;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& pivot_bias;
  const Tensor& order;

  int64_t N() const { return order.size(0); }
};

// What the forward and the backward pass share: the law of the second stage for h of R columns, of which `like` has
// dtype and device; whether all is as the kernels want it; and the pre-activation (..., N) by PyTorch.
void check(const char* op, const PivotedUp& of, int64_t R, const Tensor& like);
bool is_plain(const PivotedUp& of);
Tensor pre_activation(const PivotedUp& of, const Tensor& h);

// Registers all for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_PIVOTED(library, runtime)                                                                 \
  library.impl("low_rank_pivoted", TORCH_BOX((&::shrank::boxed::low_rank_pivoted<&runtime>)));                         \
  library.impl("low_rank_pivoted_train", TORCH_BOX((&::shrank::boxed::low_rank_pivoted_train<&runtime>)));             \
  library.impl("low_rank_pivoted_as", TORCH_BOX((&::shrank::boxed::low_rank_pivoted_as<&runtime>)));                   \
  library.impl("low_rank_pivoted_choices", TORCH_BOX((&::shrank::boxed::low_rank_pivoted_choices<&runtime>)))

namespace boxed {

template <const Runtime* runtime>
Tensor low_rank_pivoted(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& pivot_bias, const Tensor& order, std::string_view activation,
                        const std::optional<Tensor>& residual) {
  return shrank::low_rank_pivoted({x, down, up, bias, pivot_bias, order, activation, residual}, *runtime);
}

template <const Runtime* runtime>
std::tuple<Tensor, Tensor> low_rank_pivoted_train(const Tensor& x, const Tensor& down, const Tensor& up,
                                                  const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& pivot_bias, const Tensor& order,
                                                  std::string_view activation, const std::optional<Tensor>& residual) {
  return shrank::low_rank_pivoted_train({x, down, up, bias, pivot_bias, order, activation, residual}, *runtime);
}

template <const Runtime* runtime>
std::tuple<Tensor, Tensor> low_rank_pivoted_as(const Tensor& x, const Tensor& down, const Tensor& up,
                                               const std::optional<Tensor>& bias,
                                               const std::optional<Tensor>& pivot_bias, const Tensor& order,
                                               std::string_view activation, const std::optional<Tensor>& residual,
                                               bool training, std::string_view kernel,
                                               const std::vector<int64_t>& grid) {
  return shrank::low_rank_pivoted_as({x, down, up, bias, pivot_bias, order, activation, residual},
                                     {training, kernel, grid}, *runtime);
}

template <const Runtime* runtime>
std::string low_rank_pivoted_choices(const Tensor& x, const Tensor& down, const Tensor& up,
                                     const std::optional<Tensor>& bias, const std::optional<Tensor>& pivot_bias,
                                     const Tensor& order, std::string_view activation,
                                     const std::optional<Tensor>& residual, int64_t most) {
  return shrank::low_rank_pivoted_choices({x, down, up, bias, pivot_bias, order, activation, residual}, most, *runtime);
}

}  // namespace boxed
}  // namespace shrank
