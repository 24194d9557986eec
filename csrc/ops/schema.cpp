// For C++ programs, where no Python registers the ops.
#include <torch/csrc/stable/library.h>

// The schemas of shrank/ops/schema.py, which defines them only where this has not; tests/ops/test_law.py compares them.
STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) {
  library.def("low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', "
              "Tensor? residual=None) -> Tensor");
  library.def("low_rank_linear_train(Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', "
              "Tensor? residual=None) -> (Tensor y, Tensor h, Tensor z)");
}
