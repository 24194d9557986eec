#include "select.h"

#include <algorithm>

#include "cost.h"

namespace shrank {
namespace {

// ---- the candidates: may it run, and only then what it costs

namespace two_gemms {

const char* why_not(const Problem&, const Device&) { return nullptr; }

double microseconds(const Problem& p, const Device& d) { return two_gemms_us(p, d) + torch_tail_us(p, d); }

constexpr const char* kReason = "the second GEMM adds the bias for free, and nothing else is left to fuse";

}  // namespace two_gemms

namespace two_gemms_epilogue {

const char* why_not(const Problem& p, const Device&) {
  return has_tail(p) ? nullptr : "no activation and no residual: the second GEMM adds the bias for free";
}

double microseconds(const Problem& p, const Device& d) { return two_gemms_us(p, d) + epilogue_us(p, d); }

constexpr const char* kReason =
    "activation and residual in one pass over y, in fp32; the bias is free in the second GEMM";

}  // namespace two_gemms_epilogue

namespace fused {

const char* why_not(const Problem& p, const Device& d) { return linear_why_not(p, d, true); }

double microseconds(const Problem& p, const Device& d) { return linear_grid(p, d, true).microseconds; }

constexpr const char* kReason = "one launch: h stays in shared memory, and y is written once, finished";

}  // namespace fused

namespace gemm_expand {

const char* why_not(const Problem& p, const Device& d) { return linear_why_not(p, d, false); }

double microseconds(const Problem& p, const Device& d) {
  const auto M = static_cast<double>(p.M), K = static_cast<double>(p.K), R = static_cast<double>(p.R);
  return gemm_us(M, R, K, 0, p.dtype, d) + linear_grid(p, d, false).microseconds;
}

constexpr const char* kReason = "h by cuBLAS; the second product, bias, activation and residual in one kernel of ours";

}  // namespace gemm_expand

// In the order of the enum. At equal cost the earlier wins: it needs no more memory and rounds no more often.
constexpr std::array<Way<Kernel, Problem>, kKernelCount> kWays{{
    {Kernel::fused, "fused", fused::why_not, fused::microseconds, fused::kReason},
    {Kernel::gemm_expand, "gemm_expand", gemm_expand::why_not, gemm_expand::microseconds, gemm_expand::kReason},
    {Kernel::two_gemms_epilogue, "two_gemms_epilogue", two_gemms_epilogue::why_not, two_gemms_epilogue::microseconds,
     two_gemms_epilogue::kReason},
    {Kernel::two_gemms, "two_gemms", two_gemms::why_not, two_gemms::microseconds, two_gemms::kReason},
}};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::string_view name_of(Kernel kernel) { return kWays[static_cast<std::size_t>(kernel)].name; }

std::array<Candidate<Kernel>, kKernelCount> candidates(const Problem& p, const Device& d) {
  return candidates_of(kWays, p, d);
}

KernelChoice select(const Problem& p, const Device& d) {
  const auto [way, predicted] = choose(kWays, p, d);
  KernelChoice choice{way.kernel, predicted, way.reason, {}};
  if (choice.kernel == Kernel::fused || choice.kernel == Kernel::gemm_expand)
    choice.grid = linear_grid(p, d, choice.kernel == Kernel::fused).grid;
  return choice;
}

const KernelChoice& recall(const Problem& p, const Device& d) {
  thread_local Memory<Problem, KernelChoice> memory;
  const auto mix = static_cast<uint64_t>(p.M * 31 + p.K * 7 + p.N * 5 + p.R * 3 + static_cast<int>(p.activation) * 2 +
                                         p.training + p.residual * 11);
  return memory.recall(p, mix, d, [](const Problem& q, const Device& e) { return select(q, e); });
}

double floor_us(const Problem& p, const Device& d) {
  const auto M = static_cast<double>(p.M), K = static_cast<double>(p.K), N = static_cast<double>(p.N),
             R = static_cast<double>(p.R);
  const double read = M * K + R * (K + N) + bias_numbers(p) + (p.residual ? M * N : 0);
  const double written = M * N + (p.training ? M * R : 0) + (keeps_preactivation(p) ? M * N : 0);
  return roofline_us(2 * M * R * (K + N), read + written, p.dtype, d);
}

double dense_us(const Problem& p, const Device& d) {
  return gemm_us(static_cast<double>(p.M), static_cast<double>(p.N), static_cast<double>(p.K), bias_numbers(p), p.dtype,
                 d) +
         torch_tail_us(p, d);
}

EpilogueTile epilogue_tile(const Problem& p, const Device& d) {
  constexpr int kThreads = 256, kWidest = 256, kNarrowest = 8;  // aligned: at least 128 contiguous bytes per row
  constexpr int64_t kBlocksPerSm = 8;  // 2048 threads fill an SM; gridDim.y stays far below its limit of 65535
  const int widest_access = 16 / bytes(p.dtype);
  const int vector = p.aligned && p.N % widest_access == 0 ? widest_access : 1;
  const int64_t vectors = p.N / vector;

  // The widest that leaves at most 1/8 of its lanes without a column, else the one that leaves the fewest.
  const auto lanes = [vectors](int width) { return ceil_div(vectors, width) * width; };
  int threads_n = kWidest;
  for (int width = kWidest; width >= kNarrowest; width /= 2) {
    if (lanes(width) < lanes(threads_n)) threads_n = width;
    if (8 * (lanes(threads_n) - vectors) <= lanes(threads_n)) break;
  }

  const int threads_m = kThreads / threads_n;
  const int64_t blocks_n = p.M == 0 ? 0 : ceil_div(vectors, threads_n);
  if (blocks_n == 0) return {vector, threads_n, threads_m, 0, 0};
  const int64_t enough = ceil_div(d.sms * kBlocksPerSm, blocks_n);
  return {vector, threads_n, threads_m, blocks_n, std::min(ceil_div(p.M, threads_m), enough)};
}

}  // namespace shrank
