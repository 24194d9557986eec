#include "linear_cost.h"

#include "cost.h"
#include "integers.h"

namespace shrank {

// h counts as written and read; if L2 holds it, it may never see DRAM.
double two_gemms_us(const LinearProblem& p, const Device& d) {
  if (p.gate_R) return two_gemms_us(p.gate(), d) + two_gemms_us(p.value(), d);
  const auto M = real(p.M), K = real(p.K), N = real(p.N), R = real(p.R);
  return gemm_us(M, R, K, 0, p.dtype, d) + gemm_us(M, N, R, bias_numbers(p), p.dtype, d);
}

double floor_us(const LinearProblem& p, const Device& d) {
  const auto M = real(p.M), K = real(p.K), N = real(p.N), R = real(p.ranks());
  const double read = M * K + R * (K + N) + bias_numbers(p) + (p.residual ? M * N : 0);
  const double written = M * N + (p.training ? M * R : 0);
  return roofline_us(2 * M * R * (K + N), read + written, p.dtype, d);
}

double dense_us(const LinearProblem& p, const Device& d) {
  const double one = gemm_us(real(p.M), real(p.N), real(p.K), bias_numbers(p) / p.pairs(), p.dtype, d);
  return p.pairs() * one + torch_tail_us(p, d);
}

}  // namespace shrank
