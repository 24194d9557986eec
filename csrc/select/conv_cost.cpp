#include "conv_cost.h"

#include <algorithm>
#include <cmath>

#include "cost.h"
#include "integers.h"

namespace shrank {
namespace {

double numbers_of_x(const ConvProblem& p) { return real(p.batch) * real(p.C) * real(volume(p.in)); }

// `filters` of the problem's window by cuDNN, `more` numbers moved beside x, the filters and the output. An implicit
// GEMM reads every window: from the second tap on out of L2, again for each 256 filters. (CUTLASS's, which cuDNN's are
// akin to, copy 16 bytes at a time past L1, or by TMA, which has no L1.)
double conv_us(const ConvProblem& p, double filters, double more, const Device& d) {
  const double M = real(p.pixels()), groups = real(p.groups), k = real(p.K()), taps = real(p.taps());
  const double moved = numbers_of_x(p) + filters * k + M * filters + more;
  if (p.C == p.groups && p.groups > 1) {
    const double issue = kDepthwiseInstructions * taps * M * filters / instruction_rate(d) * 1e6;
    return std::max(issue, roofline_us(2 * M * filters * k, moved, p.dtype, d)) + d.node_us;
  }
  constexpr double kFilters = 256;
  const double gathered = M * k * groups * std::ceil(filters / groups / kFilters) * bytes(p.dtype);
  const double l2 = gathered / (d.sms * kL2PerSm) * 1e6 + d.node_us;
  return std::max(l2, gemm_us(M, filters, k, moved - (M * k + k * filters + M * filters), p.dtype, d));
}

double bias_of(const ConvProblem& p) { return p.bias ? real(p.N) : 0.0; }

}  // namespace

double first_conv_us(const ConvProblem& p, const Device& d) { return conv_us(p, real(p.R), 0, d); }

double two_convs_us(const ConvProblem& p, const Device& d) {
  return first_conv_us(p, d) + gemm_us(real(p.pixels()), real(p.N), real(p.R / p.up_groups),
                                       bias_of(p) + real(p.pixels()) * real(p.R - p.R / p.up_groups), p.dtype, d);
}

double dense_us(const ConvProblem& p, const Device& d) {
  return conv_us(p, real(p.N), bias_of(p), d) + torch_tail_us(pointwise(p), d);
}

double floor_us(const ConvProblem& p, const Device& d) {
  const double M = real(p.pixels()), N = real(p.N), R = real(p.R), rank = real(p.R / p.up_groups);
  const double read = numbers_of_x(p) + R * real(p.K()) + N * rank + bias_of(p) + (p.residual ? M * N : 0);
  const double kept = p.training ? M * R : 0;
  return roofline_us(2 * M * (R * real(p.K()) + N * rank), read + M * N + kept, p.dtype, d);
}

}  // namespace shrank
