// shrank::low_rank_gated and shrank::low_rank_gated_train (schemas and law: shrank/ops/gated.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "boxed.h"

namespace shrank {

struct LowRankGated {
  const Tensor& x;
  const Tensor& gate_down;
  const Tensor& gate_up;
  const std::optional<Tensor>& gate_bias;
  const Tensor& down;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& gate_pivot_bias;
  const std::optional<Tensor>& gate_order;  // where there is one, the gate's factors are pivoted
  const std::optional<Tensor>& pivot_bias;
  const std::optional<Tensor>& order;
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

using BoxedLowRankGated = Boxed<LowRankGated, TensorIn, TensorIn, TensorIn, MaybeTensor, TensorIn, TensorIn,
                                MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, std::string_view>;

// Registers all for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_GATED(library, runtime) SHRANK_IMPL(library, low_rank_gated, BoxedLowRankGated, runtime)

}  // namespace shrank
