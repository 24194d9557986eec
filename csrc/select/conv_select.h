// (ConvProblem, Device) -> which kernel, and why: select.h for convolutions.
#pragma once

#include "choose.h"
#include "conv_grid.h"
#include "conv_problem.h"
#include "linear_grid.h"

namespace shrank {

enum class ConvKernel {
  fused,               // one kernel of ours from x to y
  conv_expand,         // h by cuDNN, then one kernel of ours: second stage, bias, activation, residual
  two_convs_epilogue,  // two cuDNN convolutions, the bias in the second, then one kernel of ours
  two_convs,           // the same convolutions, then PyTorch's own activation and residual kernels
};
inline constexpr int kConvKernelCount = 4;

std::string_view name_of(ConvKernel kernel);

struct ConvChoice {
  ConvKernel kernel;
  double microseconds;
  const char* reason;
  ConvGrid grid;            // of fused
  LinearGrid expand_grid;   // of conv_expand
};

std::array<Candidate<ConvKernel>, kConvKernelCount> candidates(const ConvProblem& p, const Device& d);

ConvChoice select(const ConvProblem& p, const Device& d);

const ConvChoice& recall(const ConvProblem& p, const Device& d);

}  // namespace shrank
