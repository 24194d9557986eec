// For C++ programs, where no Python registers the ops: their schemas, and kernels for the CPU.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "low_rank_linear.h"

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

void epilogue(const EpilogueParams& params, const EpilogueTile& tile, int) { run_epilogue_on_host(params, tile); }

void linear(const LowRankLinearParams&, const LinearGrid&, const Device&, int) {
  throw std::logic_error("shrank::low_rank_linear: select chose a GPU's kernel on a CPU");
}

constexpr Backend cpu{device, epilogue, linear};

}  // namespace
}  // namespace shrank

// The schemas of shrank/ops/schema.py, which defines them only where this has not; tests/ops/test_law.py compares them.
STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) {
  library.def("low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', "
              "Tensor? residual=None) -> Tensor");
  library.def("low_rank_linear_train(Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', "
              "Tensor? residual=None) -> (Tensor y, Tensor h, Tensor z)");
}

STABLE_TORCH_LIBRARY_IMPL(shrank, CPU, library) { SHRANK_IMPL_LOW_RANK_LINEAR(library, shrank::cpu); }
