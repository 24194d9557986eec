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
  fused,               // one kernel of ours from x to y
  gemm_expand,         // h by cuBLAS, then one kernel of ours: second product, bias, activation, residual
  two_gemms_epilogue,  // two cuBLAS GEMMs, the bias in the second, then one kernel of ours: activation, residual
  two_gemms,           // the same GEMMs, then PyTorch's own activation and residual kernels
};
inline constexpr int kLinearKernelCount = 4;

std::string_view name_of(LinearKernel kernel);

struct LinearChoice {
  LinearKernel kernel;
  double microseconds;
  const char* reason;
  LinearGrid grid;  // of fused and gemm_expand; the others have none
};

std::array<Candidate<LinearKernel>, kLinearKernelCount> candidates(const LinearProblem& p, const Device& d);

// The cheapest candidate for training and inference together, so that a layer gives the same bits either way; of those
// that are slower than two GEMMs in neither.
LinearChoice select(const LinearProblem& p, const Device& d);

// The same, remembered by the thread: a model asks of the same few problems again and again. Allocates nothing; a
// Device is known by its address.
const LinearChoice& recall(const LinearProblem& p, const Device& d);

}  // namespace shrank
