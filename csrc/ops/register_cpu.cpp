// The ops on a CPU, for C++ programs.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

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

// No tensor cores, so that select takes the GEMMs; its figures do not matter, as it then has no choice.
const Device& device(int) {
  static const Device cpu = [] {
    Device any = device_named("h200");
    any.name = any.reported_name = "CPU";
    any.arch = 0;
    return any;
  }();
  return cpu;
}

bool capturing(int) { return false; }

void epilogue(const EpilogueParams& params, const EpilogueTile& tile, int) { run_epilogue_on_host(params, tile); }

void epilogue_backward(const EpilogueBackwardParams& params, const EpilogueTile& tile, int) {
  run_epilogue_backward_on_host(params, tile);
}

void linear(const LowRankLinearParams&, const LinearGrid&, const Device&, int) {
  throw std::logic_error("shrank::low_rank_linear: select chose a GPU's kernel on a CPU");
}

void conv(const LowRankConvParams&, const ConvGrid&, const Device&, int) {
  throw std::logic_error("shrank::low_rank_conv: select chose a GPU's kernel on a CPU");
}

void expand_backward(const ExpandBackwardParams&, const LinearGrid&, const Device&, int) {
  throw std::logic_error("shrank::expand_backward: select chose a GPU's kernel on a CPU");
}

void shrink_expand(const ShrinkExpandParams&, const ShrinkExpandTile&, const Device&, int) {
  throw std::logic_error("shrank::low_rank_linear: select chose a GPU's kernel on a CPU");
}

constexpr Runtime cpu{device, capturing, epilogue, epilogue_backward, linear, shrink_expand, conv, expand_backward};

}  // namespace
}  // namespace shrank

STABLE_TORCH_LIBRARY_IMPL(shrank, CPU, library) {
  SHRANK_IMPL_LOW_RANK_LINEAR(library, shrank::cpu);
  SHRANK_IMPL_LOW_RANK_LINEAR_MULTI(library, shrank::cpu);
  SHRANK_IMPL_LOW_RANK_CONV(library, shrank::cpu);
  SHRANK_IMPL_LOW_RANK_GATED(library, shrank::cpu);
  SHRANK_IMPL_LOW_RANK_PIVOTED(library, shrank::cpu);
  SHRANK_IMPL_EXPAND_BACKWARD(library, shrank::cpu);
  SHRANK_IMPL_GATED_BACKWARD(library, shrank::cpu);
  SHRANK_IMPL_PIVOTED_BACKWARD(library, shrank::cpu);
}
