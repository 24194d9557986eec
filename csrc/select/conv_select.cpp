#include "conv_select.h"

#include "conv_cost.h"
#include "cost.h"

namespace shrank {
namespace {

// ---- the candidates: may it run, and only then what it costs

namespace two_convs {

const char* why_not(const ConvProblem&, const Device&) { return nullptr; }

double microseconds(const ConvProblem& p, const Device& d) {
  return two_convs_us(p, d) + torch_tail_us(pointwise(p), d);
}

constexpr const char* kReason = "cuDNN's two convolutions, which add the bias for free; nothing else is left to fuse";

}  // namespace two_convs

namespace two_convs_epilogue {

const char* why_not(const ConvProblem& p, const Device&) {
  if (has_tail(pointwise(p))) return nullptr;
  return "no activation and no residual: the second convolution adds the bias for free";
}

double microseconds(const ConvProblem& p, const Device& d) { return two_convs_us(p, d) + epilogue_us(pointwise(p), d); }

constexpr const char* kReason =
    "activation and residual in one pass over y, in fp32; the bias is free in the second convolution";

}  // namespace two_convs_epilogue

namespace fused {

const char* why_not(const ConvProblem& p, const Device& d) { return conv_why_not(p, d); }

double microseconds(const ConvProblem& p, const Device& d) { return conv_grid(p, d).microseconds; }

constexpr const char* kReason = "one launch: h stays in shared memory, and y is written once, finished";

}  // namespace fused

namespace conv_expand {

const char* why_not(const ConvProblem& p, const Device& d) {
  if (p.up_groups > 1) return "the second stage has groups";
  if (!p.channels_last) return "a tensor is not channels last, or does not begin at a multiple of 16 bytes";
  return linear_why_not(pointwise(p), d, false);
}

double microseconds(const ConvProblem& p, const Device& d) {
  return first_conv_us(p, d) + linear_grid(pointwise(p), d, false).microseconds;
}

constexpr const char* kReason = "h by cuDNN; the second stage, bias, activation and residual in one kernel of ours";

}  // namespace conv_expand

// In the order of the enum; the last may always run.
constexpr std::array<Way<ConvKernel, ConvProblem>, kConvKernelCount> kWays{{
    {ConvKernel::fused, "fused", fused::why_not, fused::microseconds, fused::kReason},
    {ConvKernel::conv_expand, "conv_expand", conv_expand::why_not, conv_expand::microseconds, conv_expand::kReason},
    {ConvKernel::two_convs_epilogue, "two_convs_epilogue", two_convs_epilogue::why_not,
     two_convs_epilogue::microseconds, two_convs_epilogue::kReason},
    {ConvKernel::two_convs, "two_convs", two_convs::why_not, two_convs::microseconds, two_convs::kReason},
}};

}  // namespace

std::string_view name_of(ConvKernel kernel) { return kWays[static_cast<std::size_t>(kernel)].name; }

std::array<Candidate<ConvKernel>, kConvKernelCount> candidates(const ConvProblem& p, const Device& d) {
  return candidates_of(kWays, p, d);
}

ConvChoice select(const ConvProblem& p, const Device& d) {
  const auto [way, predicted] = choose(kWays, p, d);
  ConvChoice choice{way.kernel, predicted, way.reason, {}, {}};
  if (choice.kernel == ConvKernel::fused) choice.grid = conv_grid(p, d).grid;
  if (choice.kernel == ConvKernel::conv_expand) choice.expand_grid = linear_grid(pointwise(p), d, false).grid;
  return choice;
}

const ConvChoice& recall(const ConvProblem& p, const Device& d) {
  thread_local Memory<ConvProblem, ConvChoice> memory;
  const auto mix = static_cast<uint64_t>(p.pixels() * 31 + p.C * 7 + p.N * 5 + p.R * 3 + p.taps() * 13 +
                                         static_cast<int>(p.activation) * 2 + p.training + p.residual * 11);
  return memory.recall(p, mix, d, [](const ConvProblem& q, const Device& e) { return select(q, e); });
}

}  // namespace shrank
