// The ops as an H200 would run them, on the CPU: select's own choices, our kernels in the emulator. For tests: a kernel
// that breaks a rule of its machine makes the op fail.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "../kernels/expand_backward_emulated.h"
#include "../kernels/low_rank_conv_emulated.h"
#include "../kernels/low_rank_linear_emulated.h"
#include "../kernels/shrink_expand_emulated.h"
#include "expand_backward.h"
#include "gated_backward.h"
#include "low_rank_conv.h"
#include "low_rank_gated.h"
#include "low_rank_linear.h"
#include "low_rank_linear_multi.h"
#include "low_rank_pivoted.h"
#include "pivoted_backward.h"

namespace shrank {
namespace {

const Device& device(int) {
  static const Device& emulated = device_named("h200");
  return emulated;
}

bool capturing(int) { return false; }

void epilogue(const EpilogueParams& params, const EpilogueTile& tile, int) { run_epilogue_on_host(params, tile); }

void epilogue_backward(const EpilogueBackwardParams& params, const EpilogueTile& tile, int) {
  run_epilogue_backward_on_host(params, tile);
}

void linear(const LowRankLinearParams& params, const LinearGrid& grid, const Device&, int) {
  const emulator::Result result = emulate_low_rank_linear(params, grid, {});
  if (!result.problems.empty()) throw std::runtime_error("shrank::low_rank_linear: " + result.problems.front());
}

void conv(const LowRankConvParams& params, const ConvGrid& grid, const Device&, int) {
  const emulator::Result result = emulate_low_rank_conv(params, grid, {});
  if (!result.problems.empty()) throw std::runtime_error("shrank::low_rank_conv: " + result.problems.front());
}

void expand_backward(const ExpandBackwardParams& params, const LinearGrid& grid, const Device&, int) {
  const emulator::Result result = emulate_expand_backward(params, grid, {});
  if (!result.problems.empty()) throw std::runtime_error("shrank::expand_backward: " + result.problems.front());
}

void shrink_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, const Device&, int) {
  const emulator::Result result = emulate_shrink_expand(params, tile, {});
  if (!result.problems.empty()) throw std::runtime_error("shrank::low_rank_linear: " + result.problems.front());
}

constexpr Runtime emulated{device, capturing,     epilogue, epilogue_backward,
                           linear, shrink_expand, conv,     expand_backward};

}  // namespace
}  // namespace shrank

STABLE_TORCH_LIBRARY_IMPL(shrank, CPU, library) {
  SHRANK_IMPL_LOW_RANK_LINEAR(library, shrank::emulated);
  SHRANK_IMPL_LOW_RANK_LINEAR_MULTI(library, shrank::emulated);
  SHRANK_IMPL_LOW_RANK_CONV(library, shrank::emulated);
  SHRANK_IMPL_LOW_RANK_GATED(library, shrank::emulated);
  SHRANK_IMPL_LOW_RANK_PIVOTED(library, shrank::emulated);
  SHRANK_IMPL_EXPAND_BACKWARD(library, shrank::emulated);
  SHRANK_IMPL_GATED_BACKWARD(library, shrank::emulated);
  SHRANK_IMPL_PIVOTED_BACKWARD(library, shrank::emulated);
}
