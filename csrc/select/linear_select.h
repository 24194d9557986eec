// (LinearProblem, Device) -> which kernel, and why. No CUDA, no torch: runs on any machine.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "choose.h"
#include "device.h"
#include "linear_grid.h"
#include "linear_problem.h"

namespace shrank {

// A new kernel is one value here, and in linear_select.cpp one row and the functions it names.
enum class LinearKernel {
  shrink_expand,       // for a few rows: two kernels of ours that stream the factors
  fused,               // one kernel of ours from x to y
  gemm_expand,         // h by cuBLAS, then one kernel of ours: second product, bias, activation, residual
  apart,               // of a gated layer with pivots: gate and value by their own ops, then their product
  two_gemms_epilogue,  // two cuBLAS GEMMs, the bias in the second, then one kernel of ours: activation, residual
  two_gemms,           // the same GEMMs, then PyTorch's own activation and residual kernels
};
inline constexpr int kLinearKernelCount = 6;

std::string_view name_of(LinearKernel kernel);

struct LinearChoice {
  LinearKernel kernel;
  double microseconds;
  const char* reason;
  LinearGrid grid;  // of the matrix kernels; the others have none
};

std::array<Candidate<LinearKernel>, kLinearKernelCount> candidates(const LinearProblem& p, const Device& d);

// What was measured to be the fastest; where nothing was, what choose.h takes by the model.
LinearChoice select(const LinearProblem& p, const Device& d);

// By the model alone, whatever was measured.
LinearChoice modelled(const LinearProblem& p, const Device& d);

// Everything that may run, each matrix kernel on its `most` cheapest grids by the model; PyTorch's own calls last.
std::vector<LinearChoice> choices(const LinearProblem& p, const Device& d, std::size_t most);

// What a caller names instead: a kernel, and where it has a grid its block_m, max_rank and blocks_n (of shrink_expand:
// tokens, 0 and splits of K), or none of them for the cheapest. std::invalid_argument says why it cannot run.
LinearChoice choice_named(const LinearProblem& p, const Device& d, std::string_view kernel,
                          const std::vector<int64_t>& grid);

// The same, remembered by the thread: a model asks of the same few problems again and again. Allocates nothing; a
// Device is known by its address.
const LinearChoice& recall(const LinearProblem& p, const Device& d);

}  // namespace shrank
