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
     two_convs_epilogue::microseconds, two_convs_epilogue::kReason, false},
    {ConvKernel::two_convs, "two_convs", two_convs::why_not, two_convs::microseconds, two_convs::kReason, false},
}};

}  // namespace

std::string_view name_of(ConvKernel kernel) { return kWays[static_cast<std::size_t>(kernel)].name; }

std::array<Candidate<ConvKernel>, kConvKernelCount> candidates(const ConvProblem& p, const Device& d) {
  return candidates_of(kWays, p, d);
}

ConvChoice modelled(const ConvProblem& p, const Device& d) {
  const auto [way, predicted] = choose(kWays, p, d);
  ConvChoice choice{way.kernel, predicted, way.reason, {}, {}};
  if (choice.kernel == ConvKernel::fused) choice.grid = conv_grid(p, d).grid;
  if (choice.kernel == ConvKernel::conv_expand) choice.expand_grid = linear_grid(pointwise(p), d, false).grid;
  return choice;
}

std::vector<ConvChoice> choices(const ConvProblem& p, const Device& d, std::size_t most) {
  std::vector<ConvChoice> all;
  for (const auto& way : kWays) {
    if (way.why_not(p, d)) continue;
    if (way.kernel == ConvKernel::fused) {
      for (const PlannedConv& planned : conv_grids(p, d, most))
        all.push_back({way.kernel, planned.microseconds, way.reason, planned.grid, {}});
    } else if (way.kernel == ConvKernel::conv_expand) {
      for (const PlannedGrid& planned : linear_grids(pointwise(p), d, false, most))
        all.push_back({way.kernel, first_conv_us(p, d) + planned.microseconds, way.reason, {}, planned.grid});
    } else {
      all.push_back({way.kernel, way.microseconds(p, d), way.reason, {}, {}});
    }
  }
  return all;
}

ConvChoice choice_named(const ConvProblem& p, const Device& d, std::string_view kernel,
                        const std::vector<int64_t>& grid) {
  const auto& way = way_named(kWays, kernel, p, d);
  ConvChoice choice{way.kernel, way.microseconds(p, d), "asked for", {}, {}};
  const auto refuse = [&](const char* why_not) {
    if (why_not) throw std::invalid_argument(std::string(kernel) + ": " + why_not);
  };
  if (way.kernel == ConvKernel::fused) {
    choice.grid = conv_grid(p, d).grid;
    if (grid.empty()) return choice;
    const NamedGrid named(grid);
    const ConvTile tile{gather_of(p), named.tile};
    refuse(conv_why_not(p, d, tile, named.shares));
    choice.grid = conv_grid_of(p, tile, static_cast<int>(named.shares));
  } else if (way.kernel == ConvKernel::conv_expand) {
    const LinearProblem rows = pointwise(p);
    choice.expand_grid = linear_grid(rows, d, false).grid;
    if (grid.empty()) return choice;
    const NamedGrid named(grid);
    refuse(linear_why_not(rows, d, false, named.tile, named.shares));
    choice.expand_grid = linear_grid_of(rows, named.tile, static_cast<int>(named.shares));
  } else if (!grid.empty()) refuse("it has no grid");
  return choice;
}

ConvChoice select(const ConvProblem& p, const Device& d) {
  return choose_measured<ConvChoice>(p, d, [&](const std::string& kernel, const std::vector<int64_t>& grid) {
    return choice_named(p, d, kernel, grid);
  }, [&] { return modelled(p, d); });
}

const ConvChoice& recall(const ConvProblem& p, const Device& d) {
  thread_local Memory<ConvProblem, ConvChoice> memory;
  const auto mix = static_cast<uint64_t>(p.pixels() * 31 + p.C * 7 + p.N * 5 + p.R * 3 + p.taps() * 13 +
                                         static_cast<int>(p.activation) * 2 + p.training + p.residual * 11);
  return memory.recall(p, mix, d, [](const ConvProblem& q, const Device& e) { return select(q, e); });
}

}  // namespace shrank
