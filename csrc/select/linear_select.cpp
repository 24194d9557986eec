#include "linear_select.h"

#include "cost.h"
#include "integers.h"
#include "linear_cost.h"
#include "shrink_expand_grid.h"

namespace shrank {
namespace {

// ---- the candidates: may it run, and only then what it costs

namespace shrink_expand {

const char* why_not(const LinearProblem& p, const Device& d) { return shrink_expand_why_not(p, d); }

double microseconds(const LinearProblem& p, const Device& d) {
  return shrink_expand_grids(p, d, 1).front().microseconds;
}

constexpr const char* kReason = "few rows: both factors are streamed once, with enough of them on their way at a time";

}  // namespace shrink_expand

namespace two_gemms {

const char* why_not(const LinearProblem&, const Device&) { return nullptr; }

double microseconds(const LinearProblem& p, const Device& d) { return two_gemms_us(p, d) + torch_tail_us(p, d); }

constexpr const char* kReason = "the second GEMM adds the bias for free, and nothing else is left to fuse";

}  // namespace two_gemms

namespace two_gemms_epilogue {

const char* why_not(const LinearProblem& p, const Device&) {
  return has_tail(p) ? nullptr : "no activation and no residual: the second GEMM adds the bias for free";
}

double microseconds(const LinearProblem& p, const Device& d) { return two_gemms_us(p, d) + epilogue_us(p, d); }

constexpr const char* kReason =
    "activation and residual in one pass over y, in fp32; the bias is free in the second GEMM";

}  // namespace two_gemms_epilogue

namespace fused {

const char* why_not(const LinearProblem& p, const Device& d) { return linear_why_not(p, d, true); }

double microseconds(const LinearProblem& p, const Device& d) {
  return linear_grid(p.on_all_rows(), d, true).microseconds + all_rows_us(p, d);
}

constexpr const char* kReason = "one launch: h stays in shared memory, and y is written once, finished";

}  // namespace fused

namespace gemm_expand {

const char* why_not(const LinearProblem& p, const Device& d) { return linear_why_not(p, d, false); }

double microseconds(const LinearProblem& p, const Device& d) {
  const auto h_us = [&](int64_t R) { return gemm_us(real(p.M), real(R), real(p.K), 0, p.dtype, d); };
  return h_us(p.R) + (p.gate_R ? h_us(p.gate_R) : 0) + linear_grid(p.on_all_rows(), d, false).microseconds +
         all_rows_us(p, d);
}

constexpr const char* kReason = "h by cuBLAS; the second product, bias, activation and residual in one kernel of ours";

}  // namespace gemm_expand

namespace apart {

const char* why_not(const LinearProblem& p, const Device&) {
  return p.form() == Form::gated_pivoted ? nullptr
                                         : "no gate and value with pivots, of which no GEMM makes all columns";
}

double microseconds(const LinearProblem& p, const Device& d) {
  return modelled(p.gate(), d).microseconds + modelled(p.value(), d).microseconds + pass_us(p, d, 3);
}

constexpr const char* kReason = "gate and value each by the kernels of its own op, then their product";

}  // namespace apart

// In the order of the enum. At equal cost the earlier wins: it needs no more memory and rounds no more often.
constexpr std::array<Way<LinearKernel, LinearProblem>, kLinearKernelCount> kWays{{
    {LinearKernel::shrink_expand, "shrink_expand", shrink_expand::why_not, shrink_expand::microseconds,
     shrink_expand::kReason},
    {LinearKernel::fused, "fused", fused::why_not, fused::microseconds, fused::kReason},
    {LinearKernel::gemm_expand, "gemm_expand", gemm_expand::why_not, gemm_expand::microseconds, gemm_expand::kReason},
    {LinearKernel::apart, "apart", apart::why_not, apart::microseconds, apart::kReason, false, true},
    {LinearKernel::two_gemms_epilogue, "two_gemms_epilogue", two_gemms_epilogue::why_not,
     two_gemms_epilogue::microseconds, two_gemms_epilogue::kReason, false},
    {LinearKernel::two_gemms, "two_gemms", two_gemms::why_not, two_gemms::microseconds, two_gemms::kReason, false},
}};

// The `most` cheapest grids of a kernel of ours.
std::vector<PlannedGrid> grids_of(LinearKernel kernel, const LinearProblem& p, const Device& d, std::size_t most) {
  if (kernel == LinearKernel::shrink_expand) return shrink_expand_grids(p, d, most);
  return linear_grids(p.on_all_rows(), d, kernel == LinearKernel::fused, most);
}

// The grid that a caller names, or std::invalid_argument.
LinearGrid grid_of(LinearKernel kernel, const LinearProblem& p, const Device& d, const NamedGrid& named) {
  const bool few = kernel == LinearKernel::shrink_expand;
  const char* why_not = few ? shrink_expand_why_not(p, d, named.tile, named.shares)
                            : linear_why_not(p, d, kernel == LinearKernel::fused, named.tile, named.shares);
  if (why_not) throw std::invalid_argument(std::string(name_of(kernel)) + ": " + why_not);
  const auto shares = static_cast<int>(named.shares);
  return few ? shrink_expand_grid_of(p, named.tile, shares) : linear_grid_of(p, named.tile, shares);
}

}  // namespace

std::string_view name_of(LinearKernel kernel) { return kWays[static_cast<std::size_t>(kernel)].name; }

std::array<Candidate<LinearKernel>, kLinearKernelCount> candidates(const LinearProblem& p, const Device& d) {
  return candidates_of(kWays, p, d);
}

LinearChoice modelled(const LinearProblem& p, const Device& d) {
  const auto [way, predicted] = choose(kWays, p, d);
  LinearChoice choice{way.kernel, predicted, way.reason, {}};
  if (way.ours) choice.grid = grids_of(way.kernel, p, d, 1).front().grid;
  return choice;
}

std::vector<LinearChoice> choices(const LinearProblem& p, const Device& d, std::size_t most) {
  std::vector<LinearChoice> all;
  for (const auto& way : kWays) {
    if (way.why_not(p, d)) continue;
    if (!way.ours) {
      all.push_back({way.kernel, way.microseconds(p, d), way.reason, {}});
      continue;
    }
    const std::vector<PlannedGrid> grids = grids_of(way.kernel, p, d, most);
    const double before = way.microseconds(p, d) - grids.front().microseconds;  // the GEMM of gemm_expand
    for (const PlannedGrid& planned : grids)
      all.push_back({way.kernel, before + planned.microseconds, way.reason, planned.grid});
  }
  return all;
}

LinearChoice choice_named(const LinearProblem& p, const Device& d, std::string_view kernel,
                          const std::vector<int64_t>& grid) {
  const auto& way = way_named(kWays, kernel, p, d);
  LinearChoice choice{way.kernel, way.microseconds(p, d), "asked for", {}};
  if (!way.ours) {
    if (!grid.empty()) throw std::invalid_argument(std::string(kernel) + " has no grid");
    return choice;
  }
  choice.grid = grid.empty() ? grids_of(way.kernel, p, d, 1).front().grid
                             : grid_of(way.kernel, p, d, NamedGrid(grid, p.on_all_rows().form()));
  return choice;
}

LinearChoice select(const LinearProblem& p, const Device& d) {
  return choose_measured<LinearChoice>(p, d, [&](const std::string& kernel, const std::vector<int64_t>& grid) {
    return choice_named(p, d, kernel, grid);
  }, [&] { return modelled(p, d); });
}

const LinearChoice& recall(const LinearProblem& p, const Device& d) {
  thread_local Memory<LinearProblem, LinearChoice> memory;
  return memory.recall(p, p.mix(), d, [](const LinearProblem& q, const Device& e) { return select(q, e); });
}

}  // namespace shrank
