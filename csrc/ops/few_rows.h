// The two kernels for a few rows of x as the ops call them: outputs and what lies between are made, then they are launched.
#pragma once

#include <optional>
#include <vector>

#include "../select/linear_grid.h"
#include "runtime.h"
#include "tensors.h"

namespace shrank {

class FewRows {
 public:
  // x, M, K, dtype and activation are those of `problem`.
  FewRows(const Tensor& x, const LinearProblem& problem);

  // The next layer's y, of so many columns.
  Tensor add_layer(int64_t N);

  // The next pair of factors, of the last layer; K is read in so many splits. Its h, if that is kept: for the second
  // kernel, where there is one split, or for training.
  std::optional<Tensor> add_pair(const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias, int splits,
                                 bool training);

  // To the last pair, whose factors are pivoted.
  void add_pivots(const std::optional<Tensor>& pivot_bias, const Tensor& order);

  void add_residual(const std::optional<Tensor>& residual) { params_.residual = data_of(residual); }

  void run(const ShrinkExpandTile& tile, const Runtime& runtime) const;

 private:
  const Tensor& x_;
  ShrinkExpandParams params_{};
  int layers_ = 0, pairs_ = 0;
  std::vector<Tensor> between_;  // what lives until the launch
};

}  // namespace shrank
