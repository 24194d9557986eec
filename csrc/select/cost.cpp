#include "cost.h"

#include <algorithm>

#include "integers.h"

namespace shrank {
namespace {

double peak(const Device& d, Dtype dtype) {
  switch (dtype) {
    case Dtype::float16:
    case Dtype::bfloat16: return d.flops_half;
    case Dtype::float32: return d.flops_float32;
    case Dtype::float64: return d.flops_float64;
  }
  return d.flops_half;
}

// cuBLAS computes 128x128 tiles: a product of fewer tiles than SMs leaves some idle. It answers with smaller tiles or
// split-K, which takes 1.3 to 2 times the floor there: assumed, not measured.
constexpr double kTile = 128.0 * 128.0;
constexpr double kWorstFill = 2.0;

// A block walks k in steps of 64 numbers with three in flight; split-K keeps the walk to 16 steps: assumed.
constexpr double kStep = 64, kInFlight = 3, kLongestWalk = 16;

double walk_us(double k) { return std::min(k / kStep, kLongestWalk) * kDramLatencyUs / kInFlight; }

}  // namespace

double roofline_us(double flops, double numbers, Dtype dtype, const Device& d) {
  return std::max(flops / peak(d, dtype), numbers * bytes(dtype) / d.bandwidth) * 1e6;
}

double gemm_us(double m, double n, double k, double more, Dtype dtype, const Device& d) {
  const double busy = std::clamp(d.sms * kTile, m * n, kWorstFill * m * n);
  const double work = roofline_us(2 * busy * k, m * k + k * n + m * n + more, dtype, d);
  return std::max(work, walk_us(k)) + d.node_us;
}

double pass_us(const LinearProblem& p, const Device& d, int times) {
  return roofline_us(0, real(p.M) * real(p.N) * times, p.dtype, d) + d.node_us;
}

namespace {

double product_us(const LinearProblem& p, const Device& d) { return p.gate_R ? pass_us(p, d, 3) : 0; }

}  // namespace

double torch_tail_us(const LinearProblem& p, const Device& d) {
  return (p.activation != Activation::none ? pass_us(p, d, 2) : 0) + (p.residual ? pass_us(p, d, 3) : 0) +
         product_us(p, d);
}

double epilogue_us(const LinearProblem& p, const Device& d) {
  return pass_us(p, d, p.residual ? 3 : 2) + product_us(p, d);
}

double bias_numbers(const LinearProblem& p) { return p.bias ? real(p.pairs() * p.N) : 0.0; }

bool has_tail(const LinearProblem& p) { return p.activation != Activation::none || p.residual; }

}  // namespace shrank
