#include "low_rank_gated.h"

#include <vector>

#include "../select/explain.h"
#include "../select/linear_select.h"
#include "../select/shrink_expand_grid.h"
#include "few_rows.h"
#include "low_rank_linear.h"
#include "low_rank_pivoted.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::low_rank_gated";

const std::optional<Tensor> kNone;

// One of the two layers whose product is y; pivoted, if it has an order.
struct Factors {
  const char* prefix;  // of the names of its tensors
  const Tensor &down, &up;
  const std::optional<Tensor>&bias, &pivot_bias, &order;

  int64_t R() const { return down.size(0); }
  PivotedUp pivoted() const { return {up, bias, pivot_bias, *order}; }
  int64_t outputs() const { return order && order->dim() == 1 ? order->size(0) : up.dim() == 2 ? up.size(0) : 0; }
};

struct Two {
  Factors gate, value;

  explicit Two(const LowRankGated& args)
      : gate{"gate_", args.gate_down, args.gate_up, args.gate_bias, args.gate_pivot_bias, args.gate_order},
        value{"", args.down, args.up, args.bias, args.pivot_bias, args.order} {}

  bool are_pivoted() const { return gate.order || value.order; }
};

// The law of ops/gated.py, which eager calls do not pass through; tests/ops/test_law.py holds both to one table.
void check_plain(const Factors& of, const Tensor& x) {
  const std::string up = std::string(of.prefix) + "up", bias = std::string(of.prefix) + "bias";
  STD_TORCH_CHECK(of.up.dim() == 2 && of.up.size(1) == of.R(), kOp, ": ", up, " is ", shape(of.up), ", wanted (N, ",
                  of.R(), ")");
  check_like(kOp, up.c_str(), of.up, x);
  STD_TORCH_CHECK(!of.pivot_bias, kOp, ": ", of.prefix, "pivot_bias is ", shape(*of.pivot_bias),
                  ", wanted none without ", of.prefix, "order");
  if (!of.bias) return;
  STD_TORCH_CHECK(of.bias->dim() == 1 && of.bias->size(0) == of.up.size(0), kOp, ": ", bias, " is ", shape(*of.bias),
                  ", wanted (", of.up.size(0), ")");
  check_like(kOp, bias.c_str(), *of.bias, x);
}

void check(const Factors& of, const Tensor& x, int64_t N) {
  const int64_t K = x.size(x.dim() - 1);
  const std::string down = std::string(of.prefix) + "down";
  STD_TORCH_CHECK(of.down.dim() == 2 && of.down.size(1) == K, kOp, ": ", down, " is ", shape(of.down), ", wanted (R, ",
                  K, ")");
  check_like(kOp, down.c_str(), of.down, x);
  if (of.order) check(kOp, of.pivoted(), of.R(), x, of.prefix);
  else check_plain(of, x);
  STD_TORCH_CHECK(of.outputs() == N, kOp, ": ", of.prefix, "up is ", shape(of.up), ", of ", of.outputs(),
                  " outputs, wanted the ", N, " of the gate");
}

bool is_plain(const Factors& of) {
  return shrank::is_plain(of.down) && shrank::is_plain(of.up) && shrank::is_plain(of.bias) &&
         shrank::is_plain(of.pivot_bias) && shrank::is_plain(of.order);
}

LinearProblem problem_of(const LowRankGated& args, bool training, const Runtime& runtime) {
  const Tensor& x = args.x;
  const Two two(args);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x is 0-dimensional, wanted (..., K)");
  const Dtype dtype = dtype_of(kOp, x);
  const int64_t N = two.gate.outputs();
  check(two.gate, x, N);
  check(two.value, x, N);
  LinearProblem problem{rows_of(x), x.size(x.dim() - 1), N, two.value.R(), dtype, activation_of(kOp, args.activation)};
  problem.bias = args.gate_bias || args.bias || args.gate_pivot_bias || args.pivot_bias;
  problem.training = training;
  problem.gate_R = two.gate.R();
  problem.pivoted = two.are_pivoted();
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
    const std::optional<Tensor> h = few.add_pair(of.down, of.up, of.bias, grid.blocks_n, problem.training);
    if (of.order) few.add_pivots(of.pivot_bias, *of.order);
    return h;
  };
  const Two two(args);
  const std::optional<Tensor> gate_h = add(two.gate), h = add(two.value);
  few.run(shrink_expand_tile_of(grid), runtime);
  return {y, gate_h, h};
}

// By two GEMMs for each of gate and value; the activation by a pass of ours, in place, the product by PyTorch.
Stages with_gemms(const LowRankGated& args, const LinearProblem& problem, const Tensor& gate_h, const Tensor& h,
                  const Runtime& runtime) {
  const Two two(args);
  const auto expanded = [](const Factors& of, const Tensor& from) {
    return of.order ? pre_activation(of.pivoted(), from) : linear(from, of.up, of.bias);
  };
  const Tensor gate = as_contiguous(expanded(two.gate, gate_h));
  if (problem.activation != Activation::none) activate_into(gate, gate, problem, runtime);
  return {product(gate, expanded(two.value, h)), gate_h, h};
}

// Each of the two as the layer that it is, by its own op.
Stages apart(const LowRankGated& args, const LinearProblem& problem, const Runtime& runtime) {
  const auto run_alone = [&](const Factors& of, std::string_view activation) -> Stages {
    const LowRankLinear plain{args.x, of.down, of.up, of.bias, activation, kNone};
    const LowRankPivoted pivoted{args.x,     of.down, of.up, of.bias, of.pivot_bias, of.order ? *of.order : of.up,
                                 activation, kNone};
    if (!problem.training)
      return {of.order ? low_rank_pivoted(pivoted, runtime) : low_rank_linear(plain, runtime), {}, {}};
    const auto [y, h] = of.order ? low_rank_pivoted_train(pivoted, runtime) : low_rank_linear_train(plain, runtime);
    return {y, {}, h};
  };
  const Two two(args);
  const Stages gate = run_alone(two.gate, args.activation), value = run_alone(two.value, "none");
  return {product(gate.y, value.y), gate.h, value.h};
}

// What a matrix kernel gets in place of factors that are pivoted: rows of the unit matrix for pivots.
struct AllRows {
  Tensor up;
  std::optional<Tensor> bias;

  explicit AllRows(const Factors& of) : up(of.up), bias(of.bias) {
    if (of.order) up = all_rows(of.pivoted()), bias = all_biases(of.pivoted());
  }
};

LinearChoice recalled(const LinearProblem& p, const Device& d) { return recall(p, d); }

Stages with_choice(const LowRankGated& args, const LinearProblem& problem, const LinearChoice& choice,
                   const Runtime& runtime) {
  if (choice.kernel == LinearKernel::shrink_expand) return with_few_rows(args, problem, choice.grid, runtime);
  if (choice.kernel == LinearKernel::apart) return apart(args, problem, runtime);
  if (choice.kernel == LinearKernel::fused)
    return with_kernel(args, problem, std::nullopt, std::nullopt, choice.grid, runtime);
  const Tensor gate_h = linear(args.x, args.gate_down, std::nullopt), h = linear(args.x, args.down, std::nullopt);
  switch (choice.kernel) {
    case LinearKernel::gemm_expand:
      return with_kernel(args, problem, as_contiguous(gate_h), as_contiguous(h), choice.grid, runtime);
    case LinearKernel::two_gemms_epilogue:
    case LinearKernel::two_gemms: return with_gemms(args, problem, gate_h, h, runtime);
    case LinearKernel::shrink_expand:
    case LinearKernel::fused:
    case LinearKernel::apart: break;
  }
  STD_TORCH_CHECK(false, kOp, ": select chose an unknown kernel");
}

// `choose` gets the problem and the device.
template <typename Choose>
Stages run(const LowRankGated& args, bool training, const Runtime& runtime, const Choose& choose) {
  const LinearProblem problem = problem_of(args, training, runtime);
  const LinearChoice choice = choose(problem, runtime.device(args.x.get_device_index()));
  const bool is_matrix_kernel = choice.kernel == LinearKernel::fused || choice.kernel == LinearKernel::gemm_expand;
  if (!problem.pivoted || !is_matrix_kernel) return with_choice(args, problem, choice, runtime);
  const Two two(args);
  const AllRows gate(two.gate), value(two.value);
  return with_choice({args.x, args.gate_down, gate.up, gate.bias, args.down, value.up, value.bias, kNone, kNone, kNone,
                      kNone, args.activation},
                     problem, choice, runtime);
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
