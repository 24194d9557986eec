// shrank::low_rank_gated and shrank::low_rank_gated_train (schemas and law: shrank/ops/gated.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "runtime.h"
#include "tensors.h"

namespace shrank {

struct LowRankGated {
  const Tensor& x;
  const Tensor& gate_down;
  const Tensor& gate_up;
  const std::optional<Tensor>& gate_bias;
  const Tensor& down;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  std::string_view activation;
};

using TensorAndTwo = std::tuple<Tensor, Tensor, Tensor>;

Tensor low_rank_gated(const LowRankGated& args, const Runtime& runtime);

// y, and h of the gate and of the value.
TensorAndTwo low_rank_gated_train(const LowRankGated& args, const Runtime& runtime);

// By the kernel that is named, on the tile that is named, or an error that says why not. Without training, the h say
// nothing.
TensorAndTwo low_rank_gated_as(const LowRankGated& args, const Named& named, const Runtime& runtime);

// Everything that may compute this, as JSON (select/explain.h).
std::string low_rank_gated_choices(const LowRankGated& args, int64_t most, const Runtime& runtime);

// What the passes of PyTorch's own products share: activation(z), in y, which may be z.
void activate_into(const Tensor& y, const Tensor& z, LinearProblem problem, const Runtime& runtime);

// Registers all for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_GATED(library, runtime)                                                                   \
  library.impl("low_rank_gated", TORCH_BOX((&::shrank::boxed::low_rank_gated<&runtime>)));                             \
  library.impl("low_rank_gated_train", TORCH_BOX((&::shrank::boxed::low_rank_gated_train<&runtime>)));                 \
  library.impl("low_rank_gated_as", TORCH_BOX((&::shrank::boxed::low_rank_gated_as<&runtime>)));                       \
  library.impl("low_rank_gated_choices", TORCH_BOX((&::shrank::boxed::low_rank_gated_choices<&runtime>)))

namespace boxed {

template <const Runtime* runtime>
Tensor low_rank_gated(const Tensor& x, const Tensor& gate_down, const Tensor& gate_up,
                      const std::optional<Tensor>& gate_bias, const Tensor& down, const Tensor& up,
                      const std::optional<Tensor>& bias, std::string_view activation) {
  return shrank::low_rank_gated({x, gate_down, gate_up, gate_bias, down, up, bias, activation}, *runtime);
}

template <const Runtime* runtime>
TensorAndTwo low_rank_gated_train(const Tensor& x, const Tensor& gate_down, const Tensor& gate_up,
                                  const std::optional<Tensor>& gate_bias, const Tensor& down, const Tensor& up,
                                  const std::optional<Tensor>& bias, std::string_view activation) {
  return shrank::low_rank_gated_train({x, gate_down, gate_up, gate_bias, down, up, bias, activation}, *runtime);
}

template <const Runtime* runtime>
TensorAndTwo low_rank_gated_as(const Tensor& x, const Tensor& gate_down, const Tensor& gate_up,
                               const std::optional<Tensor>& gate_bias, const Tensor& down, const Tensor& up,
                               const std::optional<Tensor>& bias, std::string_view activation, bool training,
                               std::string_view kernel, const std::vector<int64_t>& grid) {
  return shrank::low_rank_gated_as({x, gate_down, gate_up, gate_bias, down, up, bias, activation},
                                   {training, kernel, grid}, *runtime);
}

template <const Runtime* runtime>
std::string low_rank_gated_choices(const Tensor& x, const Tensor& gate_down, const Tensor& gate_up,
                                   const std::optional<Tensor>& gate_bias, const Tensor& down, const Tensor& up,
                                   const std::optional<Tensor>& bias, std::string_view activation, int64_t most) {
  return shrank::low_rank_gated_choices({x, gate_down, gate_up, gate_bias, down, up, bias, activation}, most, *runtime);
}

}  // namespace boxed
}  // namespace shrank
