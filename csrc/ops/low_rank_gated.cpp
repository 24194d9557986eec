#include "low_rank_gated.h"

#include <vector>

#include "../select/explain.h"
#include "../select/linear_select.h"
#include "../select/shrink_expand_grid.h"
#include "few_rows.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::low_rank_gated";

// One of the two layers whose product is y.
struct Factors {
  const char *down_name, *up_name, *bias_name;
  const Tensor &down, &up;
  const std::optional<Tensor>& bias;

  int64_t R() const { return down.size(0); }
};

struct Two {
  Factors gate, value;

  explicit Two(const LowRankGated& args)
      : gate{"gate_down", "gate_up", "gate_bias", args.gate_down, args.gate_up, args.gate_bias},
        value{"down", "up", "bias", args.down, args.up, args.bias} {}
};

// The law of ops/gated.py, which eager calls do not pass through; tests/ops/test_law.py holds both to one table.
void check(const Factors& of, const Tensor& x, int64_t N) {
  const int64_t K = x.size(x.dim() - 1);
  STD_TORCH_CHECK(of.down.dim() == 2 && of.down.size(1) == K, kOp, ": ", of.down_name, " is ", shape(of.down),
                  ", wanted (R, ", K, ")");
  STD_TORCH_CHECK(of.up.dim() == 2 && of.up.size(1) == of.R(), kOp, ": ", of.up_name, " is ", shape(of.up),
                  ", wanted (N, ", of.R(), ")");
  STD_TORCH_CHECK(of.up.size(0) == N, kOp, ": ", of.up_name, " is ", shape(of.up), ", wanted (", N, ", ", of.R(),
                  "), as gate_up has ", N, " rows");
  check_like(kOp, of.down_name, of.down, x);
  check_like(kOp, of.up_name, of.up, x);
  if (!of.bias) return;
  STD_TORCH_CHECK(of.bias->dim() == 1 && of.bias->size(0) == N, kOp, ": ", of.bias_name, " is ", shape(*of.bias),
                  ", wanted (", N, ")");
  check_like(kOp, of.bias_name, *of.bias, x);
}

bool is_plain(const Factors& of) {
  return shrank::is_plain(of.down) && shrank::is_plain(of.up) && shrank::is_plain(of.bias);
}

LinearProblem problem_of(const LowRankGated& args, bool training, const Runtime& runtime) {
  const Tensor& x = args.x;
  const Two two(args);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x is 0-dimensional, wanted (..., K)");
  const Dtype dtype = dtype_of(kOp, x);
  const int64_t N = args.gate_up.dim() == 2 ? args.gate_up.size(0) : 0;
  check(two.gate, x, N);
  check(two.value, x, N);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) M *= x.size(i);
  LinearProblem problem{M, x.size(x.dim() - 1), N, two.value.R(), dtype, activation_of(kOp, args.activation)};
  problem.bias = args.gate_bias || args.bias;
  problem.training = training;
  problem.gate_R = two.gate.R();
  // A gate of rank 0 is none to select, whose kernels must then not run.
  problem.aligned = problem.gate_R && shrank::is_plain(x) && is_plain(two.gate) && is_plain(two.value);
  problem.captured = runtime.capturing(x.get_device_index());
  return problem;
}

struct Stages {
  Tensor y;
  std::optional<Tensor> gate_h, h;
};

Pair pair_of(const Factors& of, const std::optional<Tensor>& h, bool from_h) {
  return {from_h ? nullptr : of.down.const_data_ptr(), of.up.const_data_ptr(), data_of(of.bias), mutable_data_of(h),
          static_cast<int>(of.R())};
}

// One kernel of ours, from x; or, given both h, from those.
Stages with_kernel(const LowRankGated& args, const LinearProblem& problem, std::optional<Tensor> gate_h,
                   std::optional<Tensor> h, const LinearGrid& grid, const Runtime& runtime) {
  const Two two(args);
  const Tensor y = rows_like(args.x, problem.N);
  const bool from_h = h.has_value();
  if (problem.training && !from_h) gate_h = rows_like(args.x, problem.gate_R), h = rows_like(args.x, problem.R);
  const int index = y.get_device_index();
  const LowRankLinearParams params{from_h ? nullptr : args.x.const_data_ptr(),
                                   {pair_of(two.gate, gate_h, from_h), pair_of(two.value, h, from_h)},
                                   nullptr,
                                   y.mutable_data_ptr(),
                                   problem.M,
                                   static_cast<int>(problem.K),
                                   static_cast<int>(problem.N),
                                   problem.dtype,
                                   problem.activation};
  runtime.linear(params, grid, runtime.device(index), index);
  return {y, gate_h, h};
}

// Two kernels of ours that stream the factors past a few rows.
Stages with_few_rows(const LowRankGated& args, const LinearProblem& problem, const LinearGrid& grid,
                     const Runtime& runtime) {
  FewRows few(args.x, problem);
  const Tensor y = few.add_layer(problem.N);
  const auto add = [&](const Factors& of) {
    return few.add_pair(of.down, of.up, of.bias, grid.blocks_n, problem.training);
  };
  const Two two(args);
  const std::optional<Tensor> gate_h = add(two.gate), h = add(two.value);
  few.run(shrink_expand_tile_of(grid), runtime);
  return {y, gate_h, h};
}

// By two GEMMs for each of gate and value; the activation by a pass of ours, in place, the product by PyTorch.
Stages with_gemms(const LowRankGated& args, const LinearProblem& problem, const Tensor& gate_h, const Tensor& h,
                  const Runtime& runtime) {
  const Tensor gate = as_contiguous(linear(gate_h, args.gate_up, args.gate_bias));
  if (problem.activation != Activation::none) activate_into(gate, gate, problem, runtime);
  return {product(gate, linear(h, args.up, args.bias)), gate_h, h};
}

LinearChoice recalled(const LinearProblem& p, const Device& d) { return recall(p, d); }

// `choose` gets the problem and the device.
template <typename Choose>
Stages run(const LowRankGated& args, bool training, const Runtime& runtime, const Choose& choose) {
  const LinearProblem problem = problem_of(args, training, runtime);
  const LinearChoice choice = choose(problem, runtime.device(args.x.get_device_index()));
  if (choice.kernel == LinearKernel::shrink_expand) return with_few_rows(args, problem, choice.grid, runtime);
  if (choice.kernel == LinearKernel::fused)
    return with_kernel(args, problem, std::nullopt, std::nullopt, choice.grid, runtime);
  const Tensor gate_h = linear(args.x, args.gate_down, std::nullopt), h = linear(args.x, args.down, std::nullopt);
  switch (choice.kernel) {
    case LinearKernel::gemm_expand:
      return with_kernel(args, problem, as_contiguous(gate_h), as_contiguous(h), choice.grid, runtime);
    case LinearKernel::two_gemms_epilogue:
    case LinearKernel::two_gemms: return with_gemms(args, problem, gate_h, h, runtime);
    case LinearKernel::shrink_expand:
    case LinearKernel::fused: break;
  }
  STD_TORCH_CHECK(false, kOp, ": select chose an unknown kernel");
}

TensorAndTwo all_of(const Stages& stages) {
  const auto kept = [&](const std::optional<Tensor>& h) {
    return h ? as_contiguous(*h) : torch::stable::new_empty(stages.y, {0});
  };
  return {as_contiguous(stages.y), kept(stages.gate_h), kept(stages.h)};
}

}  // namespace

void activate_into(const Tensor& y, const Tensor& z, LinearProblem problem, const Runtime& runtime) {
  const EpilogueParams params{z.const_data_ptr(), nullptr,       y.mutable_data_ptr(), problem.M,
                              problem.N,          problem.dtype, problem.activation};
  problem.residual = false;
  problem.aligned = aligned(params.z) && aligned(params.y);
  const int index = z.get_device_index();
  runtime.epilogue(params, epilogue_tile(problem, runtime.device(index)), index);
}

Tensor low_rank_gated(const LowRankGated& args, const Runtime& runtime) {
  return as_contiguous(run(args, false, runtime, recalled).y);
}

TensorAndTwo low_rank_gated_train(const LowRankGated& args, const Runtime& runtime) {
  return all_of(run(args, true, runtime, recalled));
}

TensorAndTwo low_rank_gated_as(const LowRankGated& args, const Named& named, const Runtime& runtime) {
  return all_of(run(args, named.training, runtime, [&](const LinearProblem& p, const Device& d) {
    return chosen_for(kOp, [&] { return choice_named(p, d, named.kernel, named.grid); });
  }));
}

std::string low_rank_gated_choices(const LowRankGated& args, int64_t most, const Runtime& runtime) {
  const Device& device = runtime.device(args.x.get_device_index());
  return list_choices(problem_of(args, false, runtime), device, static_cast<std::size_t>(most));
}

}  // namespace shrank
