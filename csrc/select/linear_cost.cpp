#include "linear_cost.h"

#include "cost.h"
#include "integers.h"

namespace shrank {

// h counts as written and read; if L2 holds it, it may never see DRAM.
double two_gemms_us(const LinearProblem& p, const Device& d) {
  if (p.gate_R) return two_gemms_us(p.gate(), d) + two_gemms_us(p.value(), d);
  return gemm_us(real(p.M), real(p.R), real(p.K), 0, p.dtype, d) + expand_gemm_us(p, d);
}

// Of pivoted factors, with a copy of h beside the GEMM's columns, and what then puts all in order.
double expand_gemm_us(const LinearProblem& p, const Device& d) {
  const double gemm = gemm_us(real(p.M), real(p.up_rows()), real(p.R), bias_numbers(p), p.dtype, d);
  if (!p.pivoted) return gemm;
  return gemm + roofline_us(0, real(2 * p.M * p.R), p.dtype, d) + d.node_us + pass_us(p, d, 2);
}

// By four calls of PyTorch for each of gate and value: zeros, a copy, ones, and rows in order.
double all_rows_us(const LinearProblem& p, const Device& d) {
  if (p.form() != Form::gated_pivoted) return 0;
  return roofline_us(0, real(p.N * p.ranks() * 3 + p.up_numbers() * 2), p.dtype, d) + 8 * d.node_us;
}

double floor_us(const LinearProblem& p, const Device& d) {
  const auto M = real(p.M), K = real(p.K), N = real(p.N), R = real(p.ranks());
  const double weights = R * K + real(p.up_numbers());
  const double read = M * K + weights + bias_numbers(p) + (p.residual ? M * N : 0);
  const double written = M * N + (p.training ? M * R : 0);
  return roofline_us(2 * M * weights, read + written, p.dtype, d);
}

double dense_us(const LinearProblem& p, const Device& d) {
  const double one = gemm_us(real(p.M), real(p.N), real(p.K), bias_numbers(p) / p.pairs(), p.dtype, d);
  return p.pairs() * one + torch_tail_us(p, d);
}

}  // namespace shrank
