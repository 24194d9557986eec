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
     two_gemms_epilogue::microseconds, two_gemms_epilogue::kReason},
    {LinearKernel::two_gemms, "two_gemms", two_gemms::why_not, two_gemms::microseconds, two_gemms::kReason},
}};

}  // namespace

std::string_view name_of(LinearKernel kernel) { return kWays[static_cast<std::size_t>(kernel)].name; }

std::array<Candidate<LinearKernel>, kLinearKernelCount> candidates(const LinearProblem& p, const Device& d) {
  return candidates_of(kWays, p, d);
}

LinearChoice select(const LinearProblem& p, const Device& d) {
  const auto [way, predicted] = choose(kWays, p, d);
  LinearChoice choice{way.kernel, predicted, way.reason, {}};
  if (choice.kernel == LinearKernel::fused || choice.kernel == LinearKernel::gemm_expand)
    choice.grid = linear_grid(p, d, choice.kernel == LinearKernel::fused).grid;
  return choice;
}

const LinearChoice& recall(const LinearProblem& p, const Device& d) {
  thread_local Memory<LinearProblem, LinearChoice> memory;
  const auto mix = static_cast<uint64_t>(p.M * 31 + p.K * 7 + p.N * 5 + p.R * 3 + static_cast<int>(p.activation) * 2 +
                                         p.training + p.residual * 11);
  return memory.recall(p, mix, d, [](const LinearProblem& q, const Device& e) { return select(q, e); });
}

}  // namespace shrank
