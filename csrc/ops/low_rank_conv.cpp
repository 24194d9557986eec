#include "low_rank_conv.h"

#include <algorithm>

#include "../select/conv_select.h"
#include "../select/explain.h"
#include "../select/linear_select.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::low_rank_conv";
#define SHRANK_CONV_CHECK(holds, ...) STD_TORCH_CHECK(holds, "shrank::low_rank_conv: ", __VA_ARGS__)

void check_sizes(const char* name, const Sizes& sizes, std::size_t wanted, int64_t least) {
  SHRANK_CONV_CHECK(sizes.size() == wanted, name, " is ", shape(sizes), ", wanted ", wanted, " numbers");
  for (const int64_t size : sizes)
    SHRANK_CONV_CHECK(size >= least, name, " is ", shape(sizes), ", wanted numbers from ", least, " on");
}

// Sizes of d dimensions as the last d of three.
Size3 to_three(const Sizes& sizes, int64_t fill) {
  Size3 three{fill, fill, fill};
  for (std::size_t i = 0; i < sizes.size(); i++) three[3 - sizes.size() + i] = sizes[i];
  return three;
}

Sizes spatial(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin() + 2, sizes.end()};
}

// The law of conv.py, which eager calls do not pass through; tests/ops/test_conv_law.py holds both to one table.
void check_tensors(const LowRankConv& args) {
  const auto& [x, down, up, bias, stride, padding, dilation, groups, up_groups, activation, residual] = args;
  const int64_t dims = down.dim();
  SHRANK_CONV_CHECK(dims >= 3 && dims <= 5, "down is ", shape(down), ", wanted (R, C / groups, 1 to 3 kernel sizes)");
  SHRANK_CONV_CHECK(x.dim() == dims, "x is ", shape(x), ", wanted ", dims, " dimensions as down ", shape(down), " has");
  SHRANK_CONV_CHECK(groups >= 1 && up_groups >= 1, "groups are ", groups, " and ", up_groups, ", wanted at least 1");
  const int64_t C = x.size(1), R = down.size(0), N = up.dim() ? up.size(0) : 0;
  SHRANK_CONV_CHECK(C % groups == 0 && R % groups == 0, "groups is ", groups, ", wanted a divisor of the ", C,
                    " channels of x and of the rank ", R);
  SHRANK_CONV_CHECK(down.size(1) == C / groups, "down is ", shape(down), ", wanted (R, ", C / groups, ", ...) for x ",
                    shape(x), " in ", groups, " groups");
  bool point = up.dim() == dims;
  for (int64_t i = 2; point && i < dims; i++) point = up.size(i) == 1;
  SHRANK_CONV_CHECK(N % up_groups == 0 && R % up_groups == 0, "up_groups is ", up_groups,
                    ", wanted a divisor of the rank ", R, " and of the ", N, " outputs");
  SHRANK_CONV_CHECK(point && up.size(1) == R / up_groups, "up is ", shape(up), ", wanted (N, ", R / up_groups,
                    ", 1, ...) for down ", shape(down), " and ", up_groups, " up_groups");
  for (const auto& [name, tensor] : {std::pair{"down", &down}, std::pair{"up", &up}}) check_like(kOp, name, *tensor, x);
  if (!bias) return;
  SHRANK_CONV_CHECK(bias->dim() == 1 && bias->size(0) == N, "bias is ", shape(*bias), ", wanted (", N, ")");
  check_like(kOp, "bias", *bias, x);
}

ConvProblem checked_problem(const LowRankConv& args, bool training) {
  const auto& [x, down, up, bias, stride, padding, dilation, groups, up_groups, activation, residual] = args;
  const Dtype dtype = dtype_of(kOp, x);
  check_tensors(args);
  const Sizes kernel = spatial(down);
  const std::size_t d = kernel.size();
  check_sizes("stride", stride, d, 1);
  check_sizes("dilation", dilation, d, 1);
  check_sizes("kernel", kernel, d, 1);
  const bool both = padding.size() == 2 * d;
  check_sizes("padding", padding, both ? 2 * d : d, 0);
  Sizes begin = padding, end = padding;
  for (std::size_t i = 0; both && i < d; i++) begin[i] = padding[2 * i], end[i] = padding[2 * i + 1];
  if (both) begin.resize(d), end.resize(d);
  ConvProblem p{x.size(0),
                x.size(1),
                up.size(0),
                down.size(0),
                to_three(spatial(x), 1),
                to_three(kernel, 1),
                to_three(stride, 1),
                to_three(begin, 0),
                to_three(end, 0),
                to_three(dilation, 1),
                groups,
                up_groups,
                dtype,
                activation_of(kOp, activation),
                bias.has_value(),
                residual.has_value(),
                training};
  Sizes y{p.batch, p.N};
  for (std::size_t i = 3 - d; i < 3; i++) {
    const int64_t padded = p.in[i] + p.begin[i] + p.end[i], reach = p.dilation[i] * (p.kernel[i] - 1) + 1;
    SHRANK_CONV_CHECK(padded >= reach, "x is ", shape(x), ", wanted at least ", reach,
                      " numbers in each padded dimension for the kernel of down ", shape(down));
    y.push_back(p.out()[i]);
  }
  if (residual) {
    const auto found = residual->sizes();
    SHRANK_CONV_CHECK(std::equal(found.begin(), found.end(), y.begin(), y.end()), "residual is ", shape(*residual),
                      ", wanted ", shape(y));
    check_like(kOp, "residual", *residual, x);
  }
  return p;
}

// Whether the channels are innermost and nothing lies between: strides of a contiguous (batch, ..., channels).
bool has_channels_last(const Tensor& tensor) {
  int64_t next = 1;
  const int64_t dims = tensor.dim();
  const auto fits = [&](int64_t i) {
    const bool fit = tensor.size(i) == 1 || tensor.stride(i) == next;
    next *= tensor.size(i);
    return fit;
  };
  if (tensor.numel() == 0) return true;
  bool all = fits(1);
  for (int64_t i = dims - 1; i >= 2; i--) all = all && fits(i);
  return all && fits(0);
}

// What the outputs are like: as x, or where that may be read either way, as down.
bool wants_channels_last(const Tensor& x, const Tensor& down) {
  return has_channels_last(x) && (!x.is_contiguous() || (has_channels_last(down) && !down.is_contiguous()));
}

// (batch, channels, *out) in one of the two memory formats.
Tensor empty_output(const ConvProblem& p, const Tensor& x, int64_t channels, bool channels_last) {
  const Size3 out = p.out();
  const std::size_t d = static_cast<std::size_t>(x.dim()) - 2;
  Sizes sizes{p.batch, channels}, strides(d + 2);
  for (std::size_t i = 3 - d; i < 3; i++) sizes.push_back(out[i]);
  int64_t next = channels_last ? channels : 1;
  for (std::size_t i = d + 1; i >= 2; i--) strides[i] = next, next *= std::max<int64_t>(sizes[i], 1);
  strides[1] = channels_last ? 1 : next;
  strides[0] = channels_last ? next : next * std::max<int64_t>(channels, 1);
  const std::optional<int64_t> none;
  return call_aten("aten::new_empty_strided", x, sizes, strides, none, none, none, std::optional<bool>());
}

Tensor with_channels_last(const Tensor& tensor) {
  if (has_channels_last(tensor)) return tensor;
  Sizes there{0}, back{0, tensor.dim() - 1};
  for (int64_t i = 2; i < tensor.dim(); i++) there.push_back(i), back.push_back(i - 1);
  there.push_back(1);
  return call_aten("aten::permute", as_contiguous(call_aten("aten::permute", tensor, there)), back);
}

Tensor in_format(const Tensor& tensor, bool channels_last) {
  return channels_last ? with_channels_last(tensor) : as_contiguous(tensor);
}

struct Stages {
  Tensor y;
  std::optional<Tensor> h;
};

// By cuDNN, or whatever PyTorch takes for it.
Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Sizes& stride,
                   const Sizes& padding, const Sizes& dilation, int64_t groups) {
  return call_aten("aten::convolution", x, weight, bias, stride, padding, dilation, false, Sizes(stride.size(), 0),
                   groups);
}

Tensor first_stage(const LowRankConv& args) {
  const std::size_t d = args.stride.size();
  if (args.padding.size() == d)
    return convolution(args.x, args.down, std::nullopt, args.stride, args.padding, args.dilation, args.groups);
  Sizes last_first;  // as aten pads
  for (std::size_t i = d; i-- > 0;) last_first.insert(last_first.end(), {args.padding[2 * i], args.padding[2 * i + 1]});
  const Tensor padded = torch::stable::pad(args.x, last_first);
  return convolution(padded, args.down, std::nullopt, args.stride, Sizes(d, 0), args.dilation, args.groups);
}

Tensor second_stage(const LowRankConv& args, const Tensor& h) {
  const Sizes ones(args.stride.size(), 1), zeros(args.stride.size(), 0);
  return convolution(h, args.up, args.bias, ones, zeros, ones, args.up_groups);
}

// One kernel of ours, from x.
Stages with_fused(const LowRankConv& args, const ConvProblem& problem, const ConvGrid& grid, const Runtime& runtime) {
  const Tensor y = empty_output(problem, args.x, problem.N, true);
  Stages stages{y, std::nullopt};
  if (problem.training) stages.h = empty_output(problem, args.x, problem.R, true);
  const Tensor down = with_channels_last(args.down);  // small, and kept so where the model is channels last
  LowRankConvParams params = params_of(problem, grid);
  params.x = args.x.const_data_ptr();
  params.down = down.const_data_ptr();
  params.up = args.up.const_data_ptr();
  params.bias = data_of(args.bias);
  params.residual = data_of(args.residual);
  params.h = mutable_data_of(stages.h);
  params.y = y.mutable_data_ptr();
  const int index = y.get_device_index();
  runtime.conv(params, grid, runtime.device(index), index);
  return stages;
}

// The second stage and all that follows by a kernel of ours: with channels last, pixels are rows.
Stages with_expand(const LowRankConv& args, const ConvProblem& problem, const LinearGrid& grid,
                   const Runtime& runtime) {
  const Tensor h = with_channels_last(first_stage(args)), y = empty_output(problem, args.x, problem.N, true);
  const LinearProblem rows = pointwise(problem);
  const int index = y.get_device_index();
  const Pair pair{nullptr, args.up.const_data_ptr(), data_of(args.bias), h.mutable_data_ptr(),
                  static_cast<int>(rows.R)};
  const LowRankLinearParams params{nullptr,
                                   {pair},
                                   data_of(args.residual),
                                   y.mutable_data_ptr(),
                                   rows.M,
                                   static_cast<int>(rows.K),
                                   static_cast<int>(rows.N),
                                   rows.dtype,
                                   rows.activation};
  runtime.linear(params, grid, runtime.device(index), index);
  return {y, h};
}

// activation(z) + residual, in place of z.
Stages with_epilogue(const LowRankConv& args, const ConvProblem& problem, bool channels_last, const Runtime& runtime) {
  const Tensor h = in_format(first_stage(args), channels_last), y = in_format(second_stage(args, h), channels_last);
  LinearProblem rows = pointwise(problem);
  std::optional<Tensor> residual;
  if (args.residual) residual.emplace(in_format(*args.residual, channels_last));
  const EpilogueParams params{y.const_data_ptr(), data_of(residual), y.mutable_data_ptr(), rows.M, rows.N,
                              rows.dtype,         rows.activation};
  rows.aligned = aligned(params.z) && aligned(params.residual) && aligned(params.y);
  const int index = y.get_device_index();
  runtime.epilogue(params, epilogue_tile(rows, runtime.device(index)), index);
  return {y, h};
}

ConvProblem problem_of(const LowRankConv& args, bool training, const Runtime& runtime) {
  ConvProblem problem = checked_problem(args, training);
  problem.channels_last = wants_channels_last(args.x, args.down) && aligned(args.x.const_data_ptr()) &&
                          is_plain(args.up) && is_plain(args.bias) && aligned(args.down.const_data_ptr()) &&
                          (!args.residual ||
                           (has_channels_last(*args.residual) && aligned(args.residual->const_data_ptr())));
  problem.captured = runtime.capturing(args.x.get_device_index());
  return problem;
}

ConvChoice recalled(const ConvProblem& p, const Device& d) { return recall(p, d); }

// `choose` gets the problem and the device.
template <typename Choose>
Stages run(const LowRankConv& args, bool training, const Runtime& runtime, const Choose& choose) {
  const ConvProblem problem = problem_of(args, training, runtime);
  const bool channels_last = wants_channels_last(args.x, args.down);
  const ConvChoice choice = choose(problem, runtime.device(args.x.get_device_index()));
  switch (choice.kernel) {
    case ConvKernel::fused: return with_fused(args, problem, choice.grid, runtime);
    case ConvKernel::conv_expand: return with_expand(args, problem, choice.expand_grid, runtime);
    case ConvKernel::two_convs_epilogue: return with_epilogue(args, problem, channels_last, runtime);
    case ConvKernel::two_convs: break;
  }
  SHRANK_CONV_CHECK(problem.activation == Activation::none && !problem.residual,
                    "two convolutions alone apply no activation and no residual");
  const Tensor h = in_format(first_stage(args), channels_last);
  return {in_format(second_stage(args, h), channels_last), h};
}

std::tuple<Tensor, Tensor> all_of(const Stages& stages) {
  return {stages.y, stages.h ? *stages.h : torch::stable::new_empty(stages.y, {0})};
}

}  // namespace

Tensor low_rank_conv(const LowRankConv& args, const Runtime& runtime) { return run(args, false, runtime, recalled).y; }

std::tuple<Tensor, Tensor> low_rank_conv_train(const LowRankConv& args, const Runtime& runtime) {
  return all_of(run(args, true, runtime, recalled));
}

std::tuple<Tensor, Tensor> low_rank_conv_as(const LowRankConv& args, const Named& named, const Runtime& runtime) {
  return all_of(run(args, named.training, runtime, [&](const ConvProblem& p, const Device& d) {
    return chosen_for(kOp, [&] { return choice_named(p, d, named.kernel, named.grid); });
  }));
}

std::string low_rank_conv_choices(const LowRankConv& args, int64_t most, const Runtime& runtime) {
  const Device& device = runtime.device(args.x.get_device_index());
  return list_choices(problem_of(args, false, runtime), device, static_cast<std::size_t>(most));
}

}  // namespace shrank
