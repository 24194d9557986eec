#include "pivoted_backward.h"

#include "../select/backward_select.h"
#include "expand_backward.h"
#include "low_rank_pivoted.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::pivoted_backward";

PivotedUp up_of(const PivotedBackward& args) { return {args.up, args.bias, args.pivot_bias, args.order}; }

// The law of ops/pivoted_backward.py. A problem of which x and down are no part: K is R.
LinearProblem problem_of(const PivotedBackward& args) {
  const Tensor &grad = args.grad, &h = args.h;
  STD_TORCH_CHECK(h.dim() >= 1, kOp, ": h is 0-dimensional, wanted (..., R)");
  const Dtype dtype = dtype_of(kOp, h, "h");
  const PivotedUp up = up_of(args);
  const int64_t R = h.size(h.dim() - 1);
  check(kOp, up, R, h);
  const bool fits = has_rows_of(grad, h) && grad.size(grad.dim() - 1) == up.N();
  STD_TORCH_CHECK(fits, kOp, ": grad is ", shape(grad), ", wanted the shape of h ", shape(h), " with ", up.N(),
                  " columns");
  check_like(kOp, "grad", grad, h);
  const Activation kind = activation_of(kOp, args.activation);
  STD_TORCH_CHECK(kind != Activation::none, kOp,
                  ": activation is 'none', wanted one: without it, grad is the gradient of z");
  LinearProblem problem{rows_of(h), R, up.N(), R, dtype, kind, args.bias || args.pivot_bias, false, true};
  problem.pivoted = true;
  problem.aligned = is_plain(grad) && is_plain(h) && is_plain(up);
  return problem;
}

// One kernel of ours, from h.
std::tuple<Tensor, Tensor> with_kernel(const PivotedBackward& args, const LinearProblem& problem,
                                       const LinearGrid& grid, const Runtime& runtime) {
  const Tensor dz = torch::stable::empty_like(args.grad);
  const std::optional<Tensor> sums = sums_for(args.needs_bias, args.h, backward_sum_rows(grid), problem.N);
  const int index = dz.get_device_index();
  const Pair pair{nullptr,
                  args.up.const_data_ptr(),
                  data_of(args.bias),
                  const_cast<void*>(args.h.const_data_ptr()),
                  static_cast<int>(problem.R),
                  data_of(args.pivot_bias),
                  static_cast<const int32_t*>(args.order.const_data_ptr())};
  const ExpandBackwardParams params{
      {pair},    args.grad.const_data_ptr(),  {dz.mutable_data_ptr()}, {static_cast<float*>(mutable_data_of(sums))},
      problem.M, static_cast<int>(problem.N), problem.dtype,           problem.activation};
  runtime.expand_backward(params, grid, runtime.device(index), index);
  return {dz, added_up(sums, args.h)};
}

// `choose` gets the problem and the device.
template <typename Choose>
std::tuple<Tensor, Tensor> run(const PivotedBackward& args, const Runtime& runtime, const Choose& choose) {
  const LinearProblem problem = problem_of(args);
  const BackwardChoice choice = choose(problem, runtime.device(args.h.get_device_index()));
  switch (choice.kernel) {
    case BackwardKernel::fused: return with_kernel(args, problem, choice.grid, runtime);
    case BackwardKernel::gemm_epilogue:
      return through_activation(as_contiguous(pre_activation(up_of(args), args.h)), args.grad, args.needs_bias, problem,
                                runtime);
  }
  STD_TORCH_CHECK(false, kOp, ": select chose an unknown kernel");
}

}  // namespace

std::tuple<Tensor, Tensor> pivoted_backward(const PivotedBackward& args, const Runtime& runtime) {
  return run(args, runtime, [](const LinearProblem& p, const Device& d) { return recall_backward(p, d); });
}

std::tuple<Tensor, Tensor> pivoted_backward_as(const PivotedBackward& args, std::string_view kernel,
                                               const std::vector<int64_t>& grid, const Runtime& runtime) {
  return run(args, runtime, [&](const LinearProblem& p, const Device& d) {
    return chosen_for(kOp, [&] { return backward_named(p, d, kernel, grid); });
  });
}

}  // namespace shrank
