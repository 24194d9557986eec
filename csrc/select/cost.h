// What things cost on a GPU, by a model. Every constant says where it comes from; only the H200's rates are measured.
#pragma once

#include "device.h"
#include "linear_problem.h"

namespace shrank {

// max(arithmetic, memory) at the rates of the device.
double roofline_us(double flops, double numbers, Dtype dtype, const Device& d);

// (m, k) x (k, n) by cuBLAS, `more` numbers read beside the operands, in a replayed graph.
double gemm_us(double m, double n, double k, double more, Dtype dtype, const Device& d);

// An elementwise kernel that reads or writes (M, N) this many times, in DRAM: a y that is still in L2 is faster.
double pass_us(const LinearProblem& p, const Device& d, int times);

// PyTorch's own: an activation reads and writes y, a residual or a gate's product reads two and writes one.
double torch_tail_us(const LinearProblem& p, const Device& d);

// Our epilogue kernel: one read, one write, and the residual read; in place, or beside where training keeps both. A gate's
// product is PyTorch's.
double epilogue_us(const LinearProblem& p, const Device& d);

double bias_numbers(const LinearProblem& p);
bool has_tail(const LinearProblem& p);

// From asking to having: a panel that comes from DRAM, and one that other blocks have brought into L2. Around 500 to
// 600 and 250 cycles on an A100 or H100, as microbenchmarks report them, and the barrier of a step: assumed.
inline constexpr double kDramLatencyUs = 0.4;
inline constexpr double kL2LatencyUs = 0.2;

// Reads from L2, in bytes/s: what 132 SMs draw at the 790 TFLOP/s measured on an H200, if cuBLAS computes 128x256 tiles
// in clusters of two there (6.2 TB/s), and what a single SM can draw: 64 bytes a clock, at 1.7 GHz. Assumed for all.
inline constexpr double kL2PerSm = 6.2e12 / 132, kL2OfOneSm = 64 * 1.7e9;

// What an SM can draw from DRAM when few of them are at work, in shares of an even distribution: assumed.
inline constexpr double kDrawOfOneSm = 2.0;

}  // namespace shrank
