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

// By the model alone, whatever was measured.
ConvChoice modelled(const ConvProblem& p, const Device& d);

// Everything that may run, each matrix kernel on its `most` cheapest grids by the model; PyTorch's own calls last.
std::vector<ConvChoice> choices(const ConvProblem& p, const Device& d, std::size_t most);

ConvChoice choice_named(const ConvProblem& p, const Device& d, std::string_view kernel,
                        const std::vector<int64_t>& grid);

const ConvChoice& recall(const ConvProblem& p, const Device& d);

}  // namespace shrank
