#include "linear_select.h"

#include "cost.h"
#include "integers.h"
#include "linear_cost.h"

namespace shrank {
namespace {

// ---- the candidates: may it run, and only then what it costs

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

double microseconds(const LinearProblem& p, const Device& d) { return linear_grid(p, d, true).microseconds; }

constexpr const char* kReason = "one launch: h stays in shared memory, and y is written once, finished";

}  // namespace fused

namespace gemm_expand {

const char* why_not(const LinearProblem& p, const Device& d) { return linear_why_not(p, d, false); }

double microseconds(const LinearProblem& p, const Device& d) {
  const auto M = real(p.M), K = real(p.K), R = real(p.R);
  return gemm_us(M, R, K, 0, p.dtype, d) + linear_grid(p, d, false).microseconds;
}

constexpr const char* kReason = "h by cuBLAS; the second product, bias, activation and residual in one kernel of ours";

}  // namespace gemm_expand

// In the order of the enum. At equal cost the earlier wins: it needs no more memory and rounds no more often.
constexpr std::array<Way<LinearKernel, LinearProblem>, kLinearKernelCount> kWays{{
    {LinearKernel::fused, "fused", fused::why_not, fused::microseconds, fused::kReason},
    {LinearKernel::gemm_expand, "gemm_expand", gemm_expand::why_not, gemm_expand::microseconds, gemm_expand::kReason},
    {LinearKernel::two_gemms_epilogue, "two_gemms_epilogue", two_gemms_epilogue::why_not,
     two_gemms_epilogue::microseconds, two_gemms_epilogue::kReason, false},
    {LinearKernel::two_gemms, "two_gemms", two_gemms::why_not, two_gemms::microseconds, two_gemms::kReason, false},
}};

}  // namespace

std::string_view name_of(LinearKernel kernel) { return kWays[static_cast<std::size_t>(kernel)].name; }

std::array<Candidate<LinearKernel>, kLinearKernelCount> candidates(const LinearProblem& p, const Device& d) {
  return candidates_of(kWays, p, d);
}

LinearChoice modelled(const LinearProblem& p, const Device& d) {
  const auto [way, predicted] = choose(kWays, p, d);
  LinearChoice choice{way.kernel, predicted, way.reason, {}};
  if (choice.kernel == LinearKernel::fused || choice.kernel == LinearKernel::gemm_expand)
    choice.grid = linear_grid(p, d, choice.kernel == LinearKernel::fused).grid;
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
    const bool fused = way.kernel == LinearKernel::fused;
    const double before = fused ? 0 : way.microseconds(p, d) - linear_grid(p, d, false).microseconds;
    for (const PlannedGrid& planned : linear_grids(p, d, fused, most))
      all.push_back({way.kernel, before + planned.microseconds, way.reason, planned.grid});
  }
  return all;
}

LinearChoice choice_named(const LinearProblem& p, const Device& d, std::string_view kernel,
                          const std::vector<int64_t>& grid) {
  const auto& way = way_named(kWays, kernel, p, d);
  LinearChoice choice{way.kernel, way.microseconds(p, d), "asked for", {}};
  const bool fused = way.kernel == LinearKernel::fused;
  if (!fused && way.kernel != LinearKernel::gemm_expand) {
    if (!grid.empty()) throw std::invalid_argument(std::string(kernel) + " has no grid");
    return choice;
  }
  choice.grid = linear_grid(p, d, fused).grid;
  if (grid.empty()) return choice;
  const NamedGrid named(grid);
  if (const char* why_not = linear_why_not(p, d, fused, named.tile, named.shares))
    throw std::invalid_argument(std::string(kernel) + ": " + why_not);
  choice.grid = linear_grid_of(p, named.tile, static_cast<int>(named.shares));
  return choice;
}

LinearChoice select(const LinearProblem& p, const Device& d) {
  return choose_measured<LinearChoice>(p, d, [&](const std::string& kernel, const std::vector<int64_t>& grid) {
    return choice_named(p, d, kernel, grid);
  }, [&] { return modelled(p, d); });
}

const LinearChoice& recall(const LinearProblem& p, const Device& d) {
  thread_local Memory<LinearProblem, LinearChoice> memory;
  const auto mix = static_cast<uint64_t>(p.M * 31 + p.K * 7 + p.N * 5 + p.R * 3 + static_cast<int>(p.activation) * 2 +
                                         p.training + p.residual * 11);
  return memory.recall(p, mix, d, [](const LinearProblem& q, const Device& e) { return select(q, e); });
}

}  // namespace shrank
