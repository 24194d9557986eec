// What things cost on a GPU, by a model. Every constant says where it comes from; only the H200's rates are measured.
#pragma once

#include "device.h"
#include "problem.h"

namespace shrank {

// max(arithmetic, memory) at the rates of the device.
double roofline_us(double flops, double numbers, Dtype dtype, const Device& d);

// (m, k) x (k, n) by cuBLAS, `more` numbers read beside the operands, in a replayed graph.
double gemm_us(double m, double n, double k, double more, Dtype dtype, const Device& d);

// An elementwise kernel that reads or writes (M, N) this many times, in DRAM: a y that is still in L2 is faster.
double pass_us(const Problem& p, const Device& d, int times);

// The two products of a low-rank layer by cuBLAS; the bias is in the second.
double two_gemms_us(const Problem& p, const Device& d);

double bias_numbers(const Problem& p);
bool has_tail(const Problem& p);

// From asking to having: a panel that comes from DRAM, and one that other blocks have brought into L2. Around 500 to
// 600 and 250 cycles on an A100 or H100, as microbenchmarks report them, and the barrier of a step: assumed.
inline constexpr double kDramLatencyUs = 0.4;
inline constexpr double kL2LatencyUs = 0.2;

}  // namespace shrank
