#include "expand_backward.h"

#include <array>
#include <vector>

#include "../select/backward_select.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::expand_backward";

// The law of ops/expand_backward.py. A problem of which x and down are no part: K is R.
LinearProblem checked_problem(const ExpandBackward& args) {
  const auto& [grad, h, up, bias, activation, needs_bias] = args;
  STD_TORCH_CHECK(h.dim() >= 1, "shrank::expand_backward: h is 0-dimensional, wanted (..., R)");
  const int64_t R = h.size(h.dim() - 1);
  STD_TORCH_CHECK(up.dim() == 2 && up.size(1) == R, "shrank::expand_backward: up is ", shape(up), ", wanted (N, ", R,
                  ")");
  const int64_t N = up.size(0);
  const bool fits = has_rows_of(grad, h) && grad.size(grad.dim() - 1) == N;
  STD_TORCH_CHECK(fits, "shrank::expand_backward: grad is ", shape(grad), ", wanted the shape of h ", shape(h),
                  " with ", N, " columns");
  const Dtype dtype = dtype_of(kOp, h, "h");
  check_like(kOp, "grad", grad, h);
  check_like(kOp, "up", up, h);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N, "shrank::expand_backward: bias is ", shape(*bias),
                    ", wanted (", N, ")");
    check_like(kOp, "bias", *bias, h);
  }
  const Activation kind = activation_of(kOp, activation);
  STD_TORCH_CHECK(kind != Activation::none,
                  "shrank::expand_backward: activation is 'none', wanted one: without it, "
                  "grad is the gradient of z");
  LinearProblem problem{rows_of(h), R, N, R, dtype, kind, bias.has_value(), false, true};
  problem.aligned = is_plain(grad) && is_plain(h) && is_plain(up) && is_plain(bias);
  return problem;
}

// One kernel of ours, from h.
std::tuple<Tensor, Tensor> with_kernel(const ExpandBackward& args, const LinearProblem& problem, const LinearGrid& grid,
                                       const Runtime& runtime) {
  const Tensor dz = torch::stable::empty_like(args.grad);
  const std::optional<Tensor> sums = sums_for(args.needs_bias, args.h, backward_sum_rows(grid), problem.N);
  const int index = dz.get_device_index();
  const Pair pair{nullptr, args.up.const_data_ptr(), data_of(args.bias), const_cast<void*>(args.h.const_data_ptr()),
                  static_cast<int>(problem.R)};
  const ExpandBackwardParams params{
      {pair},    args.grad.const_data_ptr(),  {dz.mutable_data_ptr()}, {static_cast<float*>(mutable_data_of(sums))},
      problem.M, static_cast<int>(problem.N), problem.dtype,           problem.activation};
  runtime.expand_backward(params, grid, runtime.device(index), index);
  return {dz, added_up(sums, args.h)};
}

// `choose` gets the problem and the device.
template <typename Choose>
std::tuple<Tensor, Tensor> run(const ExpandBackward& args, const Runtime& runtime, const Choose& choose) {
  LinearProblem problem = checked_problem(args);
  const BackwardChoice choice = choose(problem, runtime.device(args.h.get_device_index()));
  switch (choice.kernel) {
    case BackwardKernel::fused: return with_kernel(args, problem, choice.grid, runtime);
    case BackwardKernel::gemm_epilogue:
      return through_activation(as_contiguous(linear(args.h, args.up, args.bias)), args.grad, args.needs_bias, problem,
                                runtime);
  }
  STD_TORCH_CHECK(false, "shrank::expand_backward: select chose an unknown kernel");
}

}  // namespace

Tensor added_up(const std::optional<Tensor>& sums, const Tensor& like) {
  if (!sums) return torch::stable::new_empty(like, {0});
  constexpr std::array<int64_t, 1> rows{0};
  return torch::stable::to(torch::stable::sum(*sums, rows), like.scalar_type());
}

std::optional<Tensor> sums_for(bool wanted, const Tensor& like, int64_t rows, int64_t N) {
  if (!wanted) return std::nullopt;
  using torch::headeronly::ScalarType;
  const auto type = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, std::vector<int64_t>{rows, N}, type);
}

std::tuple<Tensor, Tensor> through_activation(const Tensor& z, const Tensor& grad, bool needs_bias,
                                              LinearProblem problem, const Runtime& runtime) {
  const Tensor plain = as_contiguous(grad);
  problem.aligned = is_plain(z) && is_plain(plain);
  const int index = z.get_device_index();
  const EpilogueTile tile = epilogue_tile(problem, runtime.device(index));
  const std::optional<Tensor> sums = sums_for(needs_bias, z, tile.blocks_m * tile.threads_m, problem.N);
  const EpilogueBackwardParams params{
      z.const_data_ptr(), plain.const_data_ptr(), z.mutable_data_ptr(), mutable_data_of(sums), problem.M,
      problem.N,          problem.dtype,          problem.activation};
  runtime.epilogue_backward(params, tile, index);
  return {z, added_up(sums, z)};
}

std::tuple<Tensor, Tensor> expand_backward(const ExpandBackward& args, const Runtime& runtime) {
  return run(args, runtime, [](const LinearProblem& p, const Device& d) { return recall_backward(p, d); });
}

std::tuple<Tensor, Tensor> expand_backward_as(const ExpandBackward& args, std::string_view kernel,
                                              const std::vector<int64_t>& grid, const Runtime& runtime) {
  return run(args, runtime, [&](const LinearProblem& p, const Device& d) {
    return chosen_for(kOp, [&] { return backward_named(p, d, kernel, grid); });
  });
}

}  // namespace shrank
