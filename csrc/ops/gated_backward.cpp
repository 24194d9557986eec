#include "gated_backward.h"

#include <array>

#include "../select/backward_select.h"
#include "expand_backward.h"
#include "low_rank_gated.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::gated_backward";

// The law of ops/gated_backward.py: of gate or value.
void check(const char* h_name, const Tensor& h, const char* up_name, const Tensor& up, const char* bias_name,
           const std::optional<Tensor>& bias, const Tensor& grad) {
  const int64_t last = grad.dim() - 1;
  STD_TORCH_CHECK(has_rows_of(h, grad), kOp, ": ", h_name, " is ", shape(h), ", wanted the shape of grad ", shape(grad),
                  " with R columns");
  const int64_t R = h.size(last), N = grad.size(last);
  STD_TORCH_CHECK(up.dim() == 2 && up.size(0) == N && up.size(1) == R, kOp, ": ", up_name, " is ", shape(up),
                  ", wanted (", N, ", ", R, ")");
  check_like(kOp, h_name, h, grad);
  check_like(kOp, up_name, up, grad);
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N, kOp, ": ", bias_name, " is ", shape(*bias), ", wanted (", N,
                  ")");
  check_like(kOp, bias_name, *bias, grad);
}

// A problem of which x and down are no part: K is R.
LinearProblem problem_of(const GatedBackward& args) {
  const auto& [grad, gate_h, gate_up, gate_bias, h, up, bias, activation, needs_gate_bias, needs_bias] = args;
  STD_TORCH_CHECK(grad.dim() >= 1, kOp, ": grad is 0-dimensional, wanted (..., N)");
  const Dtype dtype = dtype_of(kOp, grad, "grad");
  check("gate_h", gate_h, "gate_up", gate_up, "gate_bias", gate_bias, grad);
  check("h", h, "up", up, "bias", bias, grad);
  const int64_t R = up.size(1);
  LinearProblem problem{rows_of(grad),     R,     up.size(0), R, dtype, activation_of(kOp, activation),
                        gate_bias || bias, false, true};
  problem.gate_R = gate_up.size(1);
  problem.aligned = problem.gate_R && is_plain(grad) && is_plain(gate_h) && is_plain(gate_up) && is_plain(gate_bias) &&
                    is_plain(h) && is_plain(up) && is_plain(bias);
  return problem;
}

// One kernel of ours, from both h.
GatedGradients with_kernel(const GatedBackward& args, const LinearProblem& problem, const LinearGrid& grid,
                           const Runtime& runtime) {
  const Tensor gate = torch::stable::empty_like(args.grad), value = torch::stable::empty_like(args.grad);
  const int64_t rows = backward_sum_rows(grid);
  const std::optional<Tensor> gate_sums = sums_for(args.needs_gate_bias, gate, rows, problem.N);
  const std::optional<Tensor> sums = sums_for(args.needs_bias, value, rows, problem.N);
  const auto pair = [](const Tensor& h, const Tensor& up, const std::optional<Tensor>& bias) {
    return Pair{nullptr, up.const_data_ptr(), data_of(bias), const_cast<void*>(h.const_data_ptr()),
                static_cast<int>(up.size(1))};
  };
  const int index = gate.get_device_index();
  const ExpandBackwardParams params{
      {pair(args.gate_h, args.gate_up, args.gate_bias), pair(args.h, args.up, args.bias)},
      args.grad.const_data_ptr(),
      {gate.mutable_data_ptr(), value.mutable_data_ptr()},
      {static_cast<float*>(mutable_data_of(gate_sums)), static_cast<float*>(mutable_data_of(sums))},
      problem.M,
      static_cast<int>(problem.N),
      problem.dtype,
      problem.activation};
  runtime.expand_backward(params, grid, runtime.device(index), index);
  return {gate, value, added_up(gate_sums, gate), added_up(sums, value)};
}

// Gate and value by a GEMM each; the products by PyTorch, the rest in passes of ours.
GatedGradients with_gemms(const GatedBackward& args, const LinearProblem& problem, const Runtime& runtime) {
  const Tensor z = as_contiguous(linear(args.gate_h, args.gate_up, args.gate_bias));
  const Tensor to_gate = product(args.grad, linear(args.h, args.up, args.bias));
  Tensor opened = z;
  if (problem.activation != Activation::none) {
    opened = torch::stable::empty_like(z);
    activate_into(opened, z, problem, runtime);
  }
  const Tensor value = as_contiguous(product(args.grad, opened));
  const auto [gate, gate_bias] = through_activation(z, to_gate, args.needs_gate_bias, problem, runtime);
  std::optional<Tensor> rows;
  if (args.needs_bias) rows = torch::stable::reshape(value, {problem.M, problem.N});
  return {gate, value, gate_bias, added_up(rows, value)};
}

// `choose` gets the problem and the device.
template <typename Choose>
GatedGradients run(const GatedBackward& args, const Runtime& runtime, const Choose& choose) {
  const LinearProblem problem = problem_of(args);
  const BackwardChoice choice = choose(problem, runtime.device(args.grad.get_device_index()));
  switch (choice.kernel) {
    case BackwardKernel::fused: return with_kernel(args, problem, choice.grid, runtime);
    case BackwardKernel::gemm_epilogue: return with_gemms(args, problem, runtime);
  }
  STD_TORCH_CHECK(false, kOp, ": select chose an unknown kernel");
}

}  // namespace

GatedGradients gated_backward(const GatedBackward& args, const Runtime& runtime) {
  return run(args, runtime, [](const LinearProblem& p, const Device& d) { return recall_backward(p, d); });
}

GatedGradients gated_backward_as(const GatedBackward& args, std::string_view kernel, const std::vector<int64_t>& grid,
                                 const Runtime& runtime) {
  return run(args, runtime, [&](const LinearProblem& p, const Device& d) {
    return chosen_for(kOp, [&] { return backward_named(p, d, kernel, grid); });
  });
}

}  // namespace shrank
