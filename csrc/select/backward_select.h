// The way back through the end of a low-rank layer (kernels/expand_backward.cuh): which kernel, and on which tile.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "choose.h"
#include "device.h"
#include "linear_problem.h"
#include "linear_tile.h"

namespace shrank {

enum class BackwardKernel {
  fused,          // one kernel of ours from h: the pre-activation is never in memory
  gemm_epilogue,  // the pre-activation by cuBLAS, then one pass of ours over it
};
inline constexpr int kBackwardKernelCount = 2;

std::string_view name_of(BackwardKernel kernel);

struct BackwardChoice {
  BackwardKernel kernel;
  double microseconds;
  const char* reason;
  LinearGrid grid;  // of fused
};

// Of a problem, M, N, R, dtype, activation, bias and aligned count.
std::array<Candidate<BackwardKernel>, kBackwardKernelCount> backward_candidates(const LinearProblem& p,
                                                                                const Device& d);

// By the model, as choose.h says.
BackwardChoice choose_backward(const LinearProblem& p, const Device& d);

// The same, remembered by the thread, as recall of linear_select.h does.
const BackwardChoice& recall_backward(const LinearProblem& p, const Device& d);

// What a caller names instead: as choice_named of linear_select.h.
BackwardChoice backward_named(const LinearProblem& p, const Device& d, std::string_view kernel,
                              const std::vector<int64_t>& grid);

}  // namespace shrank
