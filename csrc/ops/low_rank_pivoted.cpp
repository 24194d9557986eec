#include "low_rank_pivoted.h"

#include <vector>

#include "../select/explain.h"
#include "../select/linear_select.h"
#include "../select/shrink_expand_grid.h"
#include "few_rows.h"
#include "low_rank_linear.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::low_rank_pivoted";

PivotedUp up_of(const LowRankPivoted& args) { return {args.up, args.bias, args.pivot_bias, args.order}; }

struct Stages {
  Tensor y;
  std::optional<Tensor> h;
};

// One kernel of ours, from x; or, given h, from that.
Stages with_kernel(const LowRankPivoted& args, const LinearProblem& problem, std::optional<Tensor> h,
                   const LinearGrid& grid, const Runtime& runtime) {
  const Tensor y = rows_like(args.x, problem.N);
  const bool from_h = h.has_value();
  if (problem.training && !from_h) h = rows_like(args.x, problem.R);
  const int index = y.get_device_index();
  const Pair pair{from_h ? nullptr : args.down.const_data_ptr(),
                  args.up.const_data_ptr(),
                  data_of(args.bias),
                  mutable_data_of(h),
                  static_cast<int>(problem.R),
                  data_of(args.pivot_bias),
                  static_cast<const int32_t*>(args.order.const_data_ptr())};
  const LowRankLinearParams params{from_h ? nullptr : args.x.const_data_ptr(),
                                   {pair},
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
Stages with_few_rows(const LowRankPivoted& args, const LinearProblem& problem, const LinearGrid& grid,
                     const Runtime& runtime) {
  FewRows few(args.x, problem);
  const Tensor y = few.add_layer(problem.N);
  const std::optional<Tensor> h = few.add_pair(args.down, args.up, args.bias, grid.blocks_n, problem.training);
  few.add_pivots(args.pivot_bias, args.order);
  few.add_residual(args.residual);
  few.run(shrink_expand_tile_of(grid), runtime);
  return {y, h};
}

LinearChoice recalled(const LinearProblem& p, const Device& d) { return recall(p, d); }

// `choose` gets the problem and the device.
template <typename Choose>
Stages run(const LowRankPivoted& args, bool training, const Runtime& runtime, const Choose& choose) {
  const LinearProblem problem = problem_of(args, training, runtime);
  const LinearChoice choice = choose(problem, runtime.device(args.x.get_device_index()));
  if (choice.kernel == LinearKernel::shrink_expand) return with_few_rows(args, problem, choice.grid, runtime);
  if (choice.kernel == LinearKernel::fused) return with_kernel(args, problem, std::nullopt, choice.grid, runtime);
  const Tensor h = linear(args.x, args.down, std::nullopt);
  switch (choice.kernel) {
    case LinearKernel::gemm_expand: return with_kernel(args, problem, as_contiguous(h), choice.grid, runtime);
    case LinearKernel::two_gemms_epilogue:
    case LinearKernel::two_gemms: {
      const Tensor z = as_contiguous(pre_activation(up_of(args), h));
      const bool ends = problem.activation != Activation::none || problem.residual;
      return {ends ? finished(z, args.residual, problem, runtime) : z, h};
    }
    case LinearKernel::shrink_expand:
    case LinearKernel::fused:
    case LinearKernel::apart: break;
  }
  STD_TORCH_CHECK(false, kOp, ": select chose an unknown kernel");
}

std::tuple<Tensor, Tensor> all_of(const Stages& stages) {
  return {stages.y, stages.h ? as_contiguous(*stages.h) : torch::stable::new_empty(stages.y, {0})};
}

}  // namespace

// The law of ops/pivoted.py, which eager calls do not pass through; tests/ops/test_law.py holds both to one table.
LinearProblem problem_of(const LowRankPivoted& args, bool training, const Runtime& runtime) {
  const Tensor& x = args.x;
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x is 0-dimensional, wanted (..., K)");
  const int64_t K = x.size(x.dim() - 1);
  STD_TORCH_CHECK(args.down.dim() == 2 && args.down.size(1) == K, kOp, ": down is ", shape(args.down), ", wanted (R, ",
                  K, ")");
  const Dtype dtype = dtype_of(kOp, x);
  check_like(kOp, "down", args.down, x);
  const PivotedUp up = up_of(args);
  const int64_t R = args.down.size(0);
  check(kOp, up, R, x);
  if (args.residual) check_residual(kOp, *args.residual, x, up.N());
  LinearProblem problem{rows_of(x), K, up.N(), R, dtype, activation_of(kOp, args.activation)};
  problem.bias = args.bias || args.pivot_bias;
  problem.residual = args.residual.has_value();
  problem.training = training;
  problem.pivoted = true;
  problem.aligned = is_plain(x) && is_plain(args.down) && is_plain(up) && is_plain(args.residual);
  problem.captured = runtime.capturing(x.get_device_index());
  return problem;
}

void check(const char* op, const PivotedUp& of, int64_t R, const Tensor& like, const std::string& prefix) {
  const auto named = [&](const char* name) { return prefix + name; };
  STD_TORCH_CHECK(of.up.dim() == 2 && of.up.size(1) == R, op, ": ", named("up"), " is ", shape(of.up),
                  ", wanted (N - R, ", R, ")");
  check_like(op, named("up").c_str(), of.up, like);
  const int64_t others = of.up.size(0);
  const auto check_bias = [&](const std::string& name, const std::optional<Tensor>& bias, int64_t wanted) {
    if (!bias) return;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == wanted, op, ": ", name, " is ", shape(*bias), ", wanted (",
                    wanted, ")");
    check_like(op, name.c_str(), *bias, like);
  };
  check_bias(named("bias"), of.bias, others);
  check_bias(named("pivot_bias"), of.pivot_bias, R);
  STD_TORCH_CHECK(of.order.dim() == 1 && of.order.size(0) == R + others, op, ": ", named("order"), " is ",
                  shape(of.order), ", wanted (", R + others, ")");
  check_int32(op, named("order").c_str(), of.order, like);
}

bool is_plain(const PivotedUp& of) {
  return is_plain(of.up) && is_plain(of.bias) && is_plain(of.pivot_bias) && is_plain(of.order);
}

// The second GEMM writes beside a copy of h, and one more call puts all columns in order.
Tensor pre_activation(const PivotedUp& of, const Tensor& h) {
  const int64_t M = rows_of(h), R = of.up.size(1), N = of.N();
  const Tensor rows = torch::stable::reshape(h, {M, R});
  Tensor by_place = torch::stable::new_empty(h, {M, N});
  Tensor own = torch::stable::narrow(by_place, 1, 0, R);
  const Tensor others = torch::stable::narrow(by_place, 1, R, N - R);
  torch::stable::copy_(own, of.pivot_bias ? torch::stable::subtract(rows, *of.pivot_bias, -1.0) : rows);
  call_aten(Operator{"aten::linear", "out"}, rows, of.up, of.bias, others);
  const auto batch = h.sizes();
  std::vector<int64_t> sizes(batch.begin(), batch.end());
  sizes.back() = N;
  return torch::stable::reshape(call_aten("aten::index_select", by_place, int64_t{1}, of.order), sizes);
}

Tensor all_rows(const PivotedUp& of) {
  const int64_t R = of.up.size(1);
  Tensor by_place = torch::stable::new_zeros(of.up, {of.N(), R});
  Tensor others = torch::stable::narrow(by_place, 0, R, of.N() - R),
         ones = call_aten("aten::diagonal", by_place, int64_t{0}, int64_t{0}, int64_t{1});
  torch::stable::copy_(others, of.up);
  torch::stable::fill_(ones, 1.0);
  return call_aten("aten::index_select", by_place, int64_t{0}, of.order);
}

std::optional<Tensor> all_biases(const PivotedUp& of) {
  if (!of.bias && !of.pivot_bias) return std::nullopt;
  const int64_t R = of.up.size(1);
  Tensor by_place = torch::stable::new_zeros(of.up, {of.N()});
  Tensor pivots = torch::stable::narrow(by_place, 0, 0, R), others = torch::stable::narrow(by_place, 0, R, of.N() - R);
  if (of.pivot_bias) torch::stable::copy_(pivots, *of.pivot_bias);
  if (of.bias) torch::stable::copy_(others, *of.bias);
  return call_aten("aten::index_select", by_place, int64_t{0}, of.order);
}

Tensor low_rank_pivoted(const LowRankPivoted& args, const Runtime& runtime) {
  return run(args, false, runtime, recalled).y;
}

std::tuple<Tensor, Tensor> low_rank_pivoted_train(const LowRankPivoted& args, const Runtime& runtime) {
  return all_of(run(args, true, runtime, recalled));
}

std::tuple<Tensor, Tensor> low_rank_pivoted_as(const LowRankPivoted& args, const Named& named, const Runtime& runtime) {
  return all_of(run(args, named.training, runtime, [&](const LinearProblem& p, const Device& d) {
    return chosen_for(kOp, [&] { return choice_named(p, d, named.kernel, named.grid); });
  }));
}

std::string low_rank_pivoted_choices(const LowRankPivoted& args, int64_t most, const Runtime& runtime) {
  const Device& device = runtime.device(args.x.get_device_index());
  return list_choices(problem_of(args, false, runtime), device, static_cast<std::size_t>(most));
}

}  // namespace shrank
