#include "select.h"

#include <algorithm>

namespace shrank {
namespace {

// ---- the machine

double peak(const Device& d, Dtype dtype) {
  switch (dtype) {
    case Dtype::float16:
    case Dtype::bfloat16: return d.flops_half;
    case Dtype::float32: return d.flops_float32;
    case Dtype::float64: return d.flops_float64;
  }
  return d.flops_half;
}

double roofline_us(double flops, double numbers, Dtype dtype, const Device& d) {
  return std::max(flops / peak(d, dtype), numbers * bytes(dtype) / d.bandwidth) * 1e6;
}

// cuBLAS computes 128x128 tiles: a product of fewer tiles than SMs leaves some idle. It answers with smaller tiles or
// split-K, which takes 1.3 to 2 times the floor there: assumed, not measured.
constexpr double kTile = 128.0 * 128.0;
constexpr double kWorstFill = 2.0;

// (m, k) x (k, n), `more` numbers read beside the operands, in a replayed graph.
double gemm_us(double m, double n, double k, double more, Dtype dtype, const Device& d) {
  const double busy = std::clamp(d.sms * kTile, m * n, kWorstFill * m * n);
  return roofline_us(2 * busy * k, m * k + k * n + m * n + more, dtype, d) + d.node_us;
}

// An elementwise kernel that reads or writes (M, N) this many times, in DRAM: a y that is still in L2 is faster.
double pass_us(const Problem& p, const Device& d, int times) {
  return roofline_us(0, static_cast<double>(p.M) * static_cast<double>(p.N) * times, p.dtype, d) + d.node_us;
}

double bias_numbers(const Problem& p) { return p.bias ? static_cast<double>(p.N) : 0.0; }

bool has_tail(const Problem& p) { return p.activation != Activation::none || p.residual; }

// PyTorch: an activation reads and writes y, a residual reads two and writes one.
double torch_tail_us(const Problem& p, const Device& d) {
  return (p.activation != Activation::none ? pass_us(p, d, 2) : 0) + (p.residual ? pass_us(p, d, 3) : 0);
}

// The bias is in the second. h counts as written and read; if L2 holds it, it may never see DRAM.
double two_gemms_us(const Problem& p, const Device& d) {
  const auto M = static_cast<double>(p.M), K = static_cast<double>(p.K), N = static_cast<double>(p.N),
             R = static_cast<double>(p.R);
  return gemm_us(M, R, K, 0, p.dtype, d) + gemm_us(M, N, R, bias_numbers(p), p.dtype, d);
}

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

// One read, one write, and the residual read; in place, or beside the GEMM's output where training keeps that.
double microseconds(const Problem& p, const Device& d) {
  return two_gemms_us(p, d) + pass_us(p, d, p.residual ? 3 : 2);
}

constexpr const char* kReason =
    "activation and residual in one pass over y, in fp32; the bias is free in the second GEMM";

}  // namespace two_gemms_epilogue

struct Row {
  Kernel kernel;
  std::string_view name;
  const char* (*why_not)(const Problem&, const Device&);
  double (*microseconds)(const Problem&, const Device&);
  const char* reason;
};

// In the order of the enum. At equal cost the earlier wins: it needs no more memory and rounds no more often.
constexpr std::array<Row, kKernelCount> kRows{{
    {Kernel::two_gemms_epilogue, "two_gemms_epilogue", two_gemms_epilogue::why_not, two_gemms_epilogue::microseconds,
     two_gemms_epilogue::kReason},
    {Kernel::two_gemms, "two_gemms", two_gemms::why_not, two_gemms::microseconds, two_gemms::kReason},
}};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::string_view name_of(Kernel kernel) { return kRows[static_cast<std::size_t>(kernel)].name; }

std::array<Candidate, kKernelCount> candidates(const Problem& p, const Device& d) {
  std::array<Candidate, kKernelCount> all;
  for (std::size_t i = 0; i < kRows.size(); ++i) {
    const char* why_not = kRows[i].why_not(p, d);
    all[i] = {kRows[i].kernel, why_not, why_not ? 0.0 : kRows[i].microseconds(p, d)};
  }
  return all;
}

KernelChoice select(const Problem& p, const Device& d) {
  const Candidate* best = nullptr;
  const auto all = candidates(p, d);
  for (const Candidate& each : all)
    if (!each.why_not && (!best || each.microseconds < best->microseconds)) best = &each;
  // Never null: two_gemms is always legal.
  return {best->kernel, best->microseconds, kRows[static_cast<std::size_t>(best->kernel)].reason};
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
                 d) + torch_tail_us(p, d);
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
