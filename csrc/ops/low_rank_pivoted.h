// shrank::low_rank_pivoted and shrank::low_rank_pivoted_train (schemas and law: shrank/ops/pivoted.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "boxed.h"

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

// After a look at the law.
LinearProblem problem_of(const LowRankPivoted& args, bool training, const Runtime& runtime);

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

// What the ops share: the law of the second stage for h of R columns, of which `like` has dtype and device, with what its
// tensors' names begin with; whether all is as the kernels want it; and the pre-activation (..., N) by PyTorch.
void check(const char* op, const PivotedUp& of, int64_t R, const Tensor& like, const std::string& prefix = "");
bool is_plain(const PivotedUp& of);
Tensor pre_activation(const PivotedUp& of, const Tensor& h);

// The same as plain factors: up (N, R), where the rows of pivots are those of the unit matrix, and the bias (N), if there
// is any.
Tensor all_rows(const PivotedUp& of);
std::optional<Tensor> all_biases(const PivotedUp& of);

using BoxedLowRankPivoted = Boxed<LowRankPivoted, TensorIn, TensorIn, TensorIn, MaybeTensor, MaybeTensor, TensorIn,
                                  std::string_view, MaybeTensor>;

// Registers all for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_LOW_RANK_PIVOTED(library, runtime)                                                                 \
  SHRANK_IMPL(library, low_rank_pivoted, BoxedLowRankPivoted, runtime)

}  // namespace shrank
