#include "low_rank_linear.h"

#include <vector>

#include "../select/explain.h"
#include "../select/linear_select.h"
#include "../select/shrink_expand_grid.h"
#include "few_rows.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::low_rank_linear";

// The law of ops/linear.py, which eager calls do not pass through; tests/ops/test_law.py holds both to one table.
LinearProblem checked_problem(const LowRankLinear& args, bool training) {
  const auto& [x, down, up, bias, activation, residual] = args;
  STD_TORCH_CHECK(x.dim() >= 1, "shrank::low_rank_linear: x is 0-dimensional, wanted (..., K)");
  const int64_t K = x.size(x.dim() - 1);
  STD_TORCH_CHECK(down.dim() == 2 && down.size(1) == K, "shrank::low_rank_linear: down is ", shape(down),
                  ", wanted (R, ", K, ")");
  const int64_t R = down.size(0);
  STD_TORCH_CHECK(up.dim() == 2 && up.size(1) == R, "shrank::low_rank_linear: up is ", shape(up), ", wanted (N, ", R,
                  ")");
  const int64_t N = up.size(0);
  const Dtype dtype = dtype_of(kOp, x);
  check_like(kOp, "down", down, x);
  check_like(kOp, "up", up, x);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N, "shrank::low_rank_linear: bias is ", shape(*bias),
                    ", wanted (", N, ")");
    check_like(kOp, "bias", *bias, x);
  }
  if (residual) check_residual(kOp, *residual, x, N);
  return {rows_of(x), K, N, R, dtype, activation_of(kOp, activation), bias.has_value(), residual.has_value(), training};
}

struct Stages {
  Tensor y;
  std::optional<Tensor> h;
};

Pair pair_of(const LowRankLinear& args, const LinearProblem& problem, const std::optional<Tensor>& h, bool from_h) {
  return {from_h ? nullptr : args.down.const_data_ptr(), args.up.const_data_ptr(), data_of(args.bias),
          mutable_data_of(h), static_cast<int>(problem.R)};
}

// One kernel of ours, from x; or, given h, from that.
Stages with_kernel(const LowRankLinear& args, const LinearProblem& problem, std::optional<Tensor> h,
                   const LinearGrid& grid, const Runtime& runtime) {
  const Tensor y = rows_like(args.x, problem.N);
  const bool from_h = h.has_value();
  if (problem.training && !from_h) h = rows_like(args.x, problem.R);
  const int index = y.get_device_index();
  const LowRankLinearParams params{from_h ? nullptr : args.x.const_data_ptr(),
                                   {pair_of(args, problem, h, from_h)},
                                   data_of(args.residual),
                                   y.mutable_data_ptr(),
                                   problem.M,
                                   static_cast<int>(problem.K),
                                   static_cast<int>(problem.N),
                                   problem.dtype,
                                   problem.activation};
  runtime.linear(params, grid, runtime.device(index), index);
  return {y, h};
}

// Two kernels of ours that stream the factors past a few rows.
Stages with_few_rows(const LowRankLinear& args, const LinearProblem& problem, const LinearGrid& grid,
                     const Runtime& runtime) {
  FewRows few(args.x, problem);
  const Tensor y = few.add_layer(problem.N);
  const std::optional<Tensor> h = few.add_pair(args.down, args.up, args.bias, grid.blocks_n, problem.training);
  few.add_residual(args.residual);
  few.run(shrink_expand_tile_of(grid), runtime);
  return {y, h};
}

LinearChoice recalled(const LinearProblem& p, const Device& d) { return recall(p, d); }

// `choose` gets the problem and the device.
template <typename Choose>
Stages run(const LowRankLinear& args, bool training, const Runtime& runtime, const Choose& choose) {
  LinearProblem problem = problem_of(args, training, runtime);
  const LinearChoice choice = choose(problem, runtime.device(args.x.get_device_index()));
  if (choice.kernel == LinearKernel::shrink_expand) return with_few_rows(args, problem, choice.grid, runtime);
  if (choice.kernel == LinearKernel::fused) return with_kernel(args, problem, std::nullopt, choice.grid, runtime);
  const Tensor h = linear(args.x, args.down, std::nullopt);
  switch (choice.kernel) {
    case LinearKernel::gemm_expand: return with_kernel(args, problem, as_contiguous(h), choice.grid, runtime);
    case LinearKernel::two_gemms_epilogue:  // the bias goes into the GEMM, where it is free
      return {finished(as_contiguous(linear(h, args.up, args.bias)), args.residual, problem, runtime), h};
    case LinearKernel::two_gemms:
      STD_TORCH_CHECK(problem.activation == Activation::none && !problem.residual,
                      "shrank::low_rank_linear: two GEMMs alone apply no activation and no residual");
      return {linear(h, args.up, args.bias), h};
    case LinearKernel::shrink_expand:
    case LinearKernel::fused:
    case LinearKernel::apart: break;
  }
  STD_TORCH_CHECK(false, "shrank::low_rank_linear: select chose an unknown kernel");
}

std::tuple<Tensor, Tensor> all_of(const Stages& stages) {
  return {as_contiguous(stages.y), stages.h ? as_contiguous(*stages.h) : torch::stable::new_empty(stages.y, {0})};
}

}  // namespace

Tensor finished(const Tensor& z, const std::optional<Tensor>& residual, LinearProblem problem, const Runtime& runtime) {
  std::optional<Tensor> plain;
  if (residual) plain.emplace(as_contiguous(*residual));
  const EpilogueParams params{z.const_data_ptr(), data_of(plain), z.mutable_data_ptr(), problem.M,
                              problem.N,          problem.dtype,  problem.activation};
  problem.aligned = aligned(params.z) && aligned(params.residual);
  const int index = z.get_device_index();
  runtime.epilogue(params, epilogue_tile(problem, runtime.device(index)), index);
  return z;
}

LinearProblem problem_of(const LowRankLinear& args, bool training, const Runtime& runtime) {
  LinearProblem problem = checked_problem(args, training);
  problem.aligned = is_plain(args.x) && is_plain(args.down) && is_plain(args.up) && is_plain(args.bias) &&
                    is_plain(args.residual);
  problem.captured = runtime.capturing(args.x.get_device_index());
  return problem;
}

Tensor low_rank_linear(const LowRankLinear& args, const Runtime& runtime) {
  return run(args, false, runtime, recalled).y;
}

std::tuple<Tensor, Tensor> low_rank_linear_train(const LowRankLinear& args, const Runtime& runtime) {
  return all_of(run(args, true, runtime, recalled));
}

std::tuple<Tensor, Tensor> low_rank_linear_as(const LowRankLinear& args, const Named& named, const Runtime& runtime) {
  return all_of(run(args, named.training, runtime, [&](const LinearProblem& p, const Device& d) {
    return chosen_for(kOp, [&] { return choice_named(p, d, named.kernel, named.grid); });
  }));
}

std::string low_rank_linear_choices(const LowRankLinear& args, int64_t most, const Runtime& runtime) {
  const Device& device = runtime.device(args.x.get_device_index());
  return list_choices(problem_of(args, false, runtime), device, static_cast<std::size_t>(most));
}

}  // namespace shrank
