#include "few_rows.h"

namespace shrank {

FewRows::FewRows(const Tensor& x, const LinearProblem& problem) : x_(x) {
  params_.x = x.const_data_ptr();
  params_.M = static_cast<int>(problem.M);
  params_.K = static_cast<int>(problem.K);
  params_.dtype = problem.dtype;
  params_.activation = problem.activation;
}

Tensor FewRows::add_layer(int64_t N) {
  const Tensor y = rows_like(x_, N);
  params_.y[layers_] = y.mutable_data_ptr();
  params_.N[layers_++] = static_cast<int>(N);
  return y;
}

std::optional<Tensor> FewRows::add_pair(const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias,
                                        int splits, bool training) {
  const int64_t R = down.size(0);
  std::optional<Tensor> h;
  if (splits == 1 || training) h = rows_like(x_, R);
  FewRowsPair& pair = params_.pair[pairs_++];
  static_cast<Pair&>(pair) = {down.const_data_ptr(), up.const_data_ptr(), data_of(bias), mutable_data_of(h),
                              static_cast<int>(R)};
  pair.splits = splits;
  if (h) between_.push_back(*h);
  if (splits == 1) return h;
  between_.push_back(
      torch::stable::new_empty(x_, std::vector<int64_t>{splits, params_.M, R}, torch::headeronly::ScalarType::Float));
  pair.sums = static_cast<float*>(between_.back().mutable_data_ptr());
  return h;
}

void FewRows::add_pivots(const std::optional<Tensor>& pivot_bias, const Tensor& order) {
  FewRowsPair& pair = params_.pair[pairs_ - 1];
  pair.pivot_bias = data_of(pivot_bias);
  pair.order = static_cast<const int32_t*>(order.const_data_ptr());
}

void FewRows::run(const ShrinkExpandTile& tile, const Runtime& runtime) const {
  const int index = x_.get_device_index();
  runtime.shrink_expand(params_, tile, runtime.device(index), index);
}

}  // namespace shrank
