// What linear layers cost on a GPU, by the model of cost.h.
#pragma once

#include "device.h"
#include "linear_problem.h"

namespace shrank {

// The two products of a low-rank layer by cuBLAS; the bias is in the second.
double two_gemms_us(const LinearProblem& p, const Device& d);

// The second of them; of pivoted factors with what puts all columns in order.
double expand_gemm_us(const LinearProblem& p, const Device& d);

// Of a gated layer with pivots, before the matrix kernels: an up of all rows for both; 0 of others.
double all_rows_us(const LinearProblem& p, const Device& d);

// What no kernel can beat: each input read once, each output written once, no FLOP wasted, no launch.
double floor_us(const LinearProblem& p, const Device& d);

// The dense layer instead: one GEMM, then PyTorch's own activation and residual kernels.
double dense_us(const LinearProblem& p, const Device& d);

}  // namespace shrank
